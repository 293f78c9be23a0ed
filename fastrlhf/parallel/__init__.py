"""The forms of `parallel`: what each rank holds of a model and its optimizer."""
