"""Credit, losses, and the step that takes them: pure functions, the table of algorithms, the learner."""
