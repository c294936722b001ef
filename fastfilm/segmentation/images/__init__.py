"""Images and masks: NIfTI files, and the way from their voxels to a network's input and back."""
