"""The bench: verification, identification, what each protocol fixes, results and figures."""
