"""`qa-platform status`: observes the files, renders them, and watches them until nothing is in progress."""
