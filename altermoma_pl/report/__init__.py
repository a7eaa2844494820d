"""What is pruned where: tables and figures."""
