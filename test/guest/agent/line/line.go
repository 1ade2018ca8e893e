// Package line is what the host and the agent in a guest say to each other: one
// JSON object a line.
package line

// MaxBytes bounds a line.
const MaxBytes = 1 << 20

// Command asks the agent to run Script in /bin/sh. Commands run side by side.
type Command struct {
	ID     int
	Script string
}

// Answer tells something about the command ID: more of its output, or its end.
type Answer struct {
	// Ready is said once, when the agent has started.
	Ready  bool   `json:",omitempty"`
	ID     int    `json:",omitempty"`
	Output string `json:",omitempty"`
	Ended  bool   `json:",omitempty"`
	// Exit is the exit status, 128 and the signal for one that was killed.
	Exit int `json:",omitempty"`
}
