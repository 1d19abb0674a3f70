"""Image files in and out: photos, crops, contact sheets, PNG files with their settings inside."""
