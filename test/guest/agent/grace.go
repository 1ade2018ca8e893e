package main

import "time"

// pipeGrace is until when output that a command has written is collected after
// its end.
func pipeGrace() time.Time { return time.Now().Add(200 * time.Millisecond) }
