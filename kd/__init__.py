"""What the teacher says: its answers, asked for over HTTP, kept in a store, and turned into training targets."""
