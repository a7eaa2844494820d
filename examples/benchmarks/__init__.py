"""Problems to compare criteria on, and scripts that measure."""
