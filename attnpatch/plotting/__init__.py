"""Pictures. Only this folder uses matplotlib, and imports it when a picture is drawn."""
