"""What runs in torch: on a CPU, in float64, and everywhere that Triton does not run."""
