package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// Times of a role's life.
const (
	// startTime bounds what a role waits for until it is ready.
	startTime = 30 * time.Second
	// registerTime bounds a gateway's way into etcd once that answers, and a node's
	// while another process has its place.
	registerTime = 10 * time.Second
	// stopTime is what an orderly stop takes at most, as long as every part ends
	// within its share of it: what is left of stopTime, but at most partTime, so
	// that one that hangs takes nothing from those after it, and at least
	// leastPartTime. What is not done by then is left to the restart, which finds
	// everything that was acknowledged.
	stopTime      = 20 * time.Second
	partTime      = 8 * time.Second
	leastPartTime = 2 * time.Second
	// stopProgressAfter is how long a part may take before a person is told.
	stopProgressAfter = 1500 * time.Millisecond
	// clientsTime is how long the clients of a frontend may take to end what they
	// have in flight; then their connections are cut.
	clientsTime = 3 * time.Second
)

// stack closes what was opened, in reverse.
type stack struct {
	names   []string
	closers []func(context.Context) error
}

func (s *stack) push(name string, closer func(context.Context) error) {
	s.names, s.closers = append(s.names, name), append(s.closers, closer)
}

// close closes everything, each part within its share of the time, and returns the
// first error.
func (s *stack) close() error {
	var first error
	deadline := time.Now().Add(stopTime)
	for i := len(s.closers) - 1; i >= 0; i-- {
		if err := s.closePart(i, min(partTime, max(leastPartTime, time.Until(deadline)))); err != nil {
			slog.Warn("stop", "part", s.names[i], "err", err)
			// etcd is away: what is not given back ends with its lease.
			if first == nil && block.KindOf(err) != block.Unavailable {
				first = fmt.Errorf("stop %s: %w", s.names[i], err)
			}
		}
	}
	s.names, s.closers = nil, nil
	return first
}

func (s *stack) closePart(i int, share time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), share)
	defer cancel()
	name, share := s.names[i], share.Round(time.Millisecond)
	patience := time.AfterFunc(stopProgressAfter, func() {
		slog.Warn("stopping: waiting for a part to end; a second Ctrl-C leaves the rest to the restart, which finds all that was acknowledged", "part", name, "at most", share)
	})
	defer patience.Stop()
	return s.closers[i](ctx)
}

// stopClients is a frontend's stop: shutdown waits for its clients, and closes
// their connections when its context ends first, which is no failure.
func stopClients(ctx context.Context, front string, shutdown func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, clientsTime)
	defer cancel()
	err := shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		slog.Warn("clients did not end what they had in flight; their connections were cut", "frontend", front, "waited", clientsTime)
		return nil
	}
	return err
}

// serveUntil runs a role: open, say that it is ready, wait for a signal or a
// failure of a part, close. A second signal ends the process at once.
func serveUntil(ctx context.Context, open func(context.Context, *stack, func(error)) error) error {
	var parts stack
	failed := make(chan error, 1)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	err := open(ctx, &parts, fail)
	if err == nil {
		select {
		case <-ctx.Done():
		case err = <-failed:
		}
	} else if ctx.Err() != nil {
		err = nil // stopped while it started: that is no failure
	}
	if closeErr := parts.close(); err == nil {
		err = closeErr
	}
	return err
}

// startLog directs the log to stderr.
func startLog(c *console, level string) error {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return block.Errorf(block.Invalid, "--log-level %q: use debug, info, warn or error", level)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(c.err, &slog.HandlerOptions{Level: l})))
	return nil
}

func logFlag(cmd *cobra.Command, level *string, normal string) {
	cmd.Flags().StringVar(level, "log-level", normal, "least level that is logged: debug, info, warn or error")
}

const (
	pidName = "firn.pid"
	// lockTime is how long a folder in use is waited for: a process that was
	// killed holds its locks until the kernel has ended its I/O.
	lockTime = time.Second
)

// lockFolder makes dir this process's own. A folder that stays in use is an
// error that names the process.
func lockFolder(ctx context.Context, fs vfs.FS, dir string) (io.Closer, error) {
	if found, err := os.Stat(dir); err == nil && !found.IsDir() {
		return nil, block.Errorf(block.Invalid, "data folder %s: that is a file; name a folder", dir)
	}
	var l io.Closer
	err := whileBusy(ctx, func() (err error) {
		l, err = vfs.Lock(fs, dir)
		return err
	})
	if err == nil {
		// Only for the message below, in another process: the lock counts.
		if err := os.WriteFile(dir+"/"+pidName, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
			slog.Warn("the folder's holder is not written down; others will not be told which process it is", "err", err)
		}
		return l, nil
	}
	if block.KindOf(err) != block.Busy {
		return nil, block.Wrap(block.Invalid, err, "data folder %s", dir)
	}
	holder := "another process"
	if text, readErr := os.ReadFile(dir + "/" + pidName); readErr == nil {
		holder = "process " + strings.TrimSpace(string(text))
	}
	return nil, block.Errorf(block.Busy, "the data folder %s is in use by %s; stop it, or choose another folder", dir, holder)
}

// whileBusy repeats take, for lockTime at most, while what it takes is in use.
func whileBusy(ctx context.Context, take func() error) error {
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	var err error
	_ = awaitReady(ctx, func(context.Context) error {
		if err = take(); err != nil && block.KindOf(err) != block.Busy {
			cancel() // waiting helps no more
		}
		return err
	})
	return err
}

// bootID is the machine's: it proves that an older process of the same folder
// cannot live on another machine or from before a restart.
func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", block.Wrap(block.Unsupported, err, "read the boot id")
	}
	return strings.TrimSpace(string(text)), nil
}

// randomNumber is never 0.
func randomNumber() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:]) | 1
}
