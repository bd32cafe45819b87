"""hcx-server: an OpenAI-compatible inference server for HyperCLOVAX-SEED-Vision-Instruct-3B."""

__version__ = "0.1.0"
