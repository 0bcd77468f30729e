"""What a person looks at before training: doctor and viewer. Imports readers and recording's video encoder; only
commands import it."""
