"""What a folder of factors says of itself, and whether it is whole: ``xquant inspect``."""
