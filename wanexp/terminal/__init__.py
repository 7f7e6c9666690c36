"""What a person sees while a run or a sweep goes on, and at its end."""
