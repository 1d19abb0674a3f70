"""Tables and figures of many runs, from their folders alone: nothing here trains or draws an image."""
