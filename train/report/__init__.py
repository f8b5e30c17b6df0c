"""``python -m train report RUN… --output report.html``: curves and tables of runs on one page."""
