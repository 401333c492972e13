"""Any number of runs, compared: figures as PNG files, and one HTML page that holds everything."""
