"""What a command reports in one line."""


class CommandError(Exception):
    """An error of the user's making or surroundings; its text is the whole report."""
