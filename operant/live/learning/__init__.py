"""What a rating teaches: lessons, steps, gates, the learner process, and taking back."""
