"""What Stable Diffusion 1.5 is: its backbone, noise schedule and samplers."""
