"""The wordings of each kind of question; {} is filled in when the question is sampled."""

from __future__ import annotations


def _ways(text: str) -> list[str]:
    return [way.strip() for way in text.replace("\n", " ").split("|")]


HELLOS = ["", "Hello!", "Hi!", "Hey!", "Hello there!", "Good day!", "Hi there!", "Excuse me."]
NICE = ["", "Great.", "Good.", "Wonderful.", "Perfect.", "Nice.", "Very good.", "Okay."]
LEAVING = ["", "That is all.", "I have to go.", "It is late.", "Okay.", "Well then.", "Time to go.", "I am done."]
GREETINGS = ["Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon", "Hello there", "Hi there"]
I_AM = ["I am {}.", "my name is {}.", "this is {}.", "I'm {}.", "{} here.", "they call me {}."]

WAYS = {
    "identity": _ways("""What is your name? | Who are you? | What are you called? | What are you? | Tell me your name. |
        Introduce yourself."""),
    "thanks": _ways("""Thank you! | Thanks! | Thanks a lot! | Many thanks! | Thank you very much! | Thank you so much. |
        That helps, thank you. | Thanks for your help."""),
    "goodbye": _ways(
        """Goodbye! | Bye! | Bye bye! | See you later! | See you soon! | Good night! | Until next time!"""
    ),
    "wellbeing": _ways("""How are you? | How are you today? | How do you do? | How are you doing? | How is it going? |
        Are you well?"""),
    "abilities": _ways("""What can you do? | How can you help me? | What do you know? | What can I ask you? | Help! |
        What are you good at?"""),
    "name": _ways("""What is my name? | Who am I? | Do you remember my name? | What am I called? | Say my name. |
        Can you tell me my name?"""),
    "pet": _ways("""What is my {} called? | What is the name of my {}? | What do I call my {}? | What's my {}'s name? |
        Do you know my {}'s name?"""),
    "colour": _ways("""What colour is {}? | What color is {}? | Which colour is {}? | Tell me the colour of {}. |
        What is the colour of {}? | What is the color of {}? | Do you know the colour of {}? | Name the colour of {}. |
        Can you tell me what colour {} is? | I wonder what colour {} is."""),
    "owned_colour": _ways("""What colour is {}'s {}? | What color is {}'s {}? | Which colour is {}'s {}? |
        Tell me the colour of {}'s {}. | What is the colour of {}'s {}?"""),
    "mix": _ways("""What do you get when you mix {} and {}? | What colour do {} and {} make? | Mix {} and {}. |
        What happens when I mix {} with {}? | Which colour comes from {} and {}? | If I mix {} and {}, what do I get? |
        I have {} paint and {} paint. What can I mix? | What color do {} and {} make?"""),
    "opposite": _ways("""What is the opposite of {}? | Tell me the opposite of {}. | Which word is the opposite of {}? |
        Name the opposite of {}. | Give me the opposite of {}. | What word means the opposite of {}? |
        The opposite of {} is what? | Do you know the opposite of {}?"""),
    "sound": _ways("""What does {} say? | What sound does {} make? | Which sound does {} make? | How does {} sound? |
        What noise does {} make? | Tell me the sound of {}. | What do you hear from {}? | Make the sound of {}."""),
    "young": _ways("""What is a young {} called? | What do you call a baby {}? | What is a baby {} called? |
        What is the name for a young {}? | What do we call a young {}? | Tell me the word for a baby {}. |
        Which word means a young {}? | Can you name a baby {}?"""),
    "day": _ways("""What day comes {} {}? | Which day comes {} {}? | Which day is {} {}? | Tell me the day {} {}. |
        What is the day {} {}? | Name the day that comes {} {}."""),
    "month": _ways("""What month comes {} {}? | Which month comes {} {}? | Which month is {} {}? |
        Tell me the month {} {}. | What is the month {} {}? | Name the month that comes {} {}."""),
    "place": _ways("""Where is the {}? | Where can I find the {}? | Do you know where the {} is? | Find the {}. |
        Where did I leave the {}?"""),
    "unknown": _ways("""Tell me about {}. | What do you know about {}? | Write a poem about {}. | Explain {}. |
        Why do people talk about {}? | Write a story about {}. | Who knows most about {}? | Help me with {}. |
        Give me five facts about {}. | Say something about {}. | What do you think about {}? |
        I want to learn about {}. | Can you teach me {}? | What is the best book on {}?"""),
    "count": _ways("""Count from {} to {}. | Please count from {} to {}. | List the numbers from {} to {}. |
        Can you count from {} to {}?"""),
    "count_to": _ways("Count to {}. | Please count up to {}. | Can you count to {}?"),
    "next_number": _ways("""What number comes {} {}? | Which number is {} {}? | Tell me the number {} {}. |
        Which number comes right {} {}?"""),
    "plus": _ways("""What is {} plus {}? | How much is {} plus {}? | Add {} and {}. | What is the sum of {} and {}? |
        {} + {} = ? | What is {} + {}? | Can you add {} and {}? | How much is {} and {}? |
        I need {} plus {}."""),
    "minus": _ways("""What is {} minus {}? | How much is {} minus {}? | What is {} - {}? | {} - {} = ? |
        What is {} less {}? | I need {} minus {}."""),
    "price": _ways("""How much is {}? | What does {} cost? | How much does {} cost? | What is the price of {}? |
        Tell me the price of {}."""),
    "total": _ways("""How much do {} and {} cost together? | What do {} and {} cost together? |
        How much for {} and {}? | What is the total price of {} and {}? |
        I buy {} and {}. How much do I pay? | What do I pay for {} and {}?"""),
    "age": _ways("How old is {}? | What is {}'s age? | Tell me how old {} is. | What age is {}?"),
}
