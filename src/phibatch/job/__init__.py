"""What runs on the driver: tables to requests, plan, generation, output, summary. Knows no engine."""
