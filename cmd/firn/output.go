package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/term"

	"firn.io/firn/internal/block"
)

// console is where a command reads and writes.
type console struct {
	in       io.Reader
	out, err io.Writer
	// terminal tells whether err is one: only then is progress shown.
	terminal bool
	// inTerminal tells whether somebody can answer a question.
	inTerminal bool
	json       bool
}

func systemConsole() *console {
	return &console{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		terminal:   term.IsTerminal(int(os.Stderr.Fd())),
		inTerminal: term.IsTerminal(int(os.Stdin.Fd())),
	}
}

// print writes v as JSON if that was asked for, else what text writes.
func (c *console) print(v any, text func(w io.Writer)) error {
	if !c.json {
		w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		text(w)
		return w.Flush()
	}
	e := json.NewEncoder(c.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// errorView is an error with --json, on standard error. Kind is a word for what
// the exit status says in a number.
type errorView struct {
	Error string `json:"error"`
	Kind  string `json:"kind"`
	Exit  int    `json:"exit"`
}

// complain shows the error that ends a command.
func (c *console) complain(err error) {
	if !c.json {
		fmt.Fprintf(c.err, "firn: %v\n", err)
		return
	}
	e := json.NewEncoder(c.err)
	e.SetIndent("", "  ")
	// A standard error that takes nothing cannot be told of anyway.
	_ = e.Encode(errorView{err.Error(), block.KindOf(err).String(), exitCode(err)})
}

// ask returns whether a person at the terminal typed what was asked for.
func (c *console) ask(question, want string) (bool, error) {
	if !c.inTerminal {
		return false, block.Errorf(block.Invalid, "%s\nNobody is there to answer; repeat the command with --yes", question)
	}
	fmt.Fprintf(c.err, "%s\nType %q to go on: ", question, want)
	line, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil {
		return false, block.Wrap(block.Canceled, err, "no answer")
	}
	return strings.TrimSpace(line) == want, nil
}

// progressAfter is how long something may take before a person is told.
const progressAfter = 2 * time.Second

// waiting runs fn and, on a terminal, shows what is being waited for.
func (c *console) waiting(ctx context.Context, what string, fn func(context.Context) error) error {
	if !c.terminal {
		return fn(ctx)
	}
	done := make(chan error, 1)
	start := time.Now()
	go func() { done <- fn(ctx) }()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	shown := false
	for {
		select {
		case err := <-done:
			if shown {
				fmt.Fprint(c.err, "\r\x1b[K")
			}
			return err
		case <-tick.C:
			if passed := time.Since(start); passed >= progressAfter {
				shown = true
				fmt.Fprintf(c.err, "\r%s, %d s so far\x1b[K", what, int(passed.Seconds()))
			}
		}
	}
}
