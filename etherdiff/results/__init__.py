"""Tables and figures of many runs, made of their folders alone: nothing here trains or draws an image."""
