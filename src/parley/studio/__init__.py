"""`parley studio`: data, runs and answers in a browser, over the same functions as the commands."""
