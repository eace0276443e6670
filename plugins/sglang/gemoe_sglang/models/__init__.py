"""What SGLang looks through for model classes: a file each, with an `EntryClass`.

A class has the name of the stock class that it replaces, by which SGLang finds it. A file that
cannot be imported is passed over with a warning, and the stock class serves with static k.
"""
