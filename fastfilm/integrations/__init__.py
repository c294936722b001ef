"""fastfilm inside other packages' training and inference: imported by nobody but their users."""
