"""The live loop on disk: conversations and feedback in a database, and the versions of the weights."""
