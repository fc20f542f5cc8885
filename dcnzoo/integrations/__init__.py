"""dcnzoo in other libraries, each in a module of its name, which is imported where it is wanted."""
