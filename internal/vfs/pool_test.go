package vfs_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"firn.io/firn/internal/vfs"
)

// openBelow counts the files below dir that this process has open.
func openBelow(t *testing.T, dir string) (n int) {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(name, dir) {
			n++
		}
	}
	return n
}

// TestPool writes and reads many files, several at once, of which few may be open.
func TestPool(t *testing.T) {
	const files, limit, users = 64, 4, 8
	dir := t.TempDir()
	p := vfs.NewPool(vfs.NewOS(), limit)
	all := make([]vfs.File, files)
	for i := range all {
		var err error
		if all[i], err = p.Open(fmt.Sprintf("%s/%d", dir, i), vfs.Create, vfs.ClassLog); err != nil {
			t.Fatal(err)
		}
	}
	if n := openBelow(t, dir); n != limit || p.OpenFiles() != n {
		t.Fatalf("%d files are open, the pool says %d", n, p.OpenFiles())
	}
	content := func(i, round int) []byte { return bytes.Repeat([]byte{byte(i), byte(round)}, 2048) }
	for round := range 4 {
		var wait sync.WaitGroup
		for u := range users {
			wait.Go(func() {
				for i := u; i < files; i += users {
					_, err := all[i].WriteAt(content(i, round), 0)
					if err == nil {
						err = all[i].Sync()
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
			wait.Go(func() {
				buf := make([]byte, 4096)
				for i := range files {
					if n, err := all[(i*7+u)%files].ReadAt(buf, 0); n != 0 && n != len(buf) {
						t.Errorf("%d bytes, %v", n, err)
					}
				}
			})
		}
		wait.Wait()
		buf := make([]byte, 4096)
		for i, f := range all {
			if _, err := f.ReadAt(buf, 0); err != nil || !bytes.Equal(buf, content(i, round)) {
				t.Fatalf("file %d in round %d: %v", i, round, err)
			}
		}
		if n := openBelow(t, dir); n > limit {
			t.Fatalf("%d files are open", n)
		}
	}

	// What was not synced stays open: its errors must not be missed.
	for _, f := range all[:limit+3] {
		if _, err := f.WriteAt([]byte("x"), 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range all[limit+3:] {
		if _, err := f.Size(); err != nil {
			t.Fatal(err)
		}
	}
	if n := openBelow(t, dir); n < limit+3 {
		t.Errorf("%d files are open, %d were not synced", n, limit+3)
	}
	for _, f := range all[:limit+3] {
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if n := openBelow(t, dir); n > limit {
		t.Errorf("%d files are open after the sync", n)
	}
	for _, f := range all {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Size(); err == nil {
			t.Fatal("used after close")
		}
	}
	if n := openBelow(t, dir); n != 0 || p.OpenFiles() != 0 {
		t.Errorf("%d files are open at the end, the pool says %d", n, p.OpenFiles())
	}
}

// slowSync is a file whose first Sync waits until it is told to go on.
type slowSync struct {
	vfs.File
	began, goOn chan struct{}
	later       atomic.Bool
}

func (f *slowSync) Sync() error {
	err := f.File.Sync()
	if !f.later.Swap(true) {
		close(f.began)
		<-f.goOn
	}
	return err
}

type slowFS struct {
	vfs.FS
	file *slowSync
}

func (s slowFS) Open(name string, f vfs.Flags, c vfs.Class) (vfs.File, error) {
	file, err := s.FS.Open(name, f, c)
	s.file.File = file
	return s.file, err
}

// A write during two syncs at once belongs to neither: the file stays open.
func TestPoolTwoSyncsAtOnce(t *testing.T) {
	slow := &slowSync{began: make(chan struct{}), goOn: make(chan struct{})}
	p := vfs.NewPool(slowFS{vfs.NewSim(0), slow}, 0)
	h, err := p.Open("/f", vfs.Create, vfs.ClassLog)
	if err != nil {
		t.Fatal(err)
	}
	write := func() {
		if _, err := h.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	write()
	write()
	ended := make(chan error)
	go func() { ended <- h.Sync() }()
	<-slow.began
	if err := h.Sync(); err != nil {
		t.Fatal(err)
	}
	write()
	close(slow.goOn)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if p.OpenFiles() != 1 {
		t.Error("a file with a write that no sync followed was closed")
	}
}
