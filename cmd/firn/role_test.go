package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// TestEachPartHasItsTime: parts that hang take nothing from those that are closed
// after them, and all of it ends.
func TestEachPartHasItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var parts stack
		hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		closed := 0
		well := func(ctx context.Context) error {
			closed++
			deadline, ok := ctx.Deadline()
			if left := time.Until(deadline); !ok || ctx.Err() != nil || left < leastPartTime || left > partTime {
				t.Errorf("part %d is given %v: %v", closed, left, ctx.Err())
			}
			return nil
		}
		for range 8 {
			parts.push("well", well)
			parts.push("hangs", hang)
		}
		parts.push("clients", func(ctx context.Context) error { return stopClients(ctx, "NBD", hang) })
		var log bytes.Buffer
		normal := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		defer slog.SetDefault(normal)
		begin := time.Now()
		if err := parts.close(); err == nil {
			t.Error("parts that hang are no failure")
		}
		if took := time.Since(begin); closed != 8 || took > stopTime+8*leastPartTime {
			t.Errorf("%d parts were closed, in %v", closed, took)
		}
		synctest.Wait()
		if n := strings.Count(log.String(), "part=hangs \"at most\""); n < 2 || strings.Contains(log.String(), "part=well \"at most\"") || !strings.Contains(log.String(), "part=clients \"at most\"") {
			t.Errorf("the log tells %d times what is waited for:\n%s", n, log.String())
		}
		parts.push("clients", func(ctx context.Context) error { return stopClients(ctx, "NBD", hang) })
		if err := parts.close(); err != nil {
			t.Errorf("clients that were cut off: %v", err)
		}
	})
}

// TestFolderWithoutPID: the lock makes a folder ours, not the file that names us.
func TestFolderWithoutPID(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, pidName), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := lockFolder(t.Context(), vfs.NewOS(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := lockFolder(t.Context(), vfs.NewOS(), dir); err == nil || block.KindOf(err) != block.Busy {
		t.Errorf("the folder was locked twice: %v", err)
	}
}

// TestNoteEndsSessions: what says that the attachment is over ends its sessions;
// a command that its initiator gave up does not.
func TestNoteEndsSessions(t *testing.T) {
	over := 0
	a := &attached{over: func() { over++ }}
	gaveUp, cancel := context.WithCancel(t.Context())
	cancel()
	for i, c := range []struct {
		ctx  context.Context
		err  error
		ends int
	}{
		{t.Context(), nil, 0},
		{t.Context(), block.Errorf(block.NoSpace, "x"), 0},
		{t.Context(), block.Errorf(block.Fenced, "x"), 1},
		{gaveUp, block.Errorf(block.Canceled, "x"), 0},
		{t.Context(), block.Errorf(block.Canceled, "x"), 1},
	} {
		over = 0
		if err := a.note(c.ctx, c.err); err != c.err || over != c.ends {
			t.Errorf("case %d: %v, over %d times", i, err, over)
		}
	}
}
