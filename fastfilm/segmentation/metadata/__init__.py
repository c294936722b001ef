"""Values of any kind, from tables and DICOM headers, as the numbers that condition a network."""
