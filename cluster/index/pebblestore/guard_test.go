package pebblestore_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/internal/vfs/pebblefs"
)

// pairs is how many each put writes, 64 KiB together.
const pairs = 64

func keyOf(round, i int) []byte { return fmt.Appendf(nil, "round %05d, %05d", round, i) }

// valueOf does not compress.
func valueOf(round, i int) []byte {
	p := make([]byte, 1<<10)
	rand.NewChaCha8([32]byte{byte(round), byte(round >> 8), byte(i)}).Read(p)
	return p
}

// fullRig is a store in a simulated file system that others may fill.
type fullRig struct {
	t    *testing.T
	fs   *vfs.Sim
	room *vfs.Reserve
	*pebblestore.Store
}

func newFullRig(t *testing.T) *fullRig {
	t.Helper()
	g := &fullRig{t: t, fs: vfs.NewSim(0)}
	if err := g.fs.MkdirAll("/disk/index"); err != nil {
		t.Fatal(err)
	}
	g.open()
	if err := g.room.Fill(); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *fullRig) tryOpen() (err error) {
	if g.room, err = vfs.OpenReserve(g.fs, "/disk", 1<<20); err != nil {
		g.t.Fatal(err)
	}
	g.Store, err = pebblestore.Open("/disk/index", pebblestore.Options{FS: pebblefs.New(g.fs, vfs.ClassIndex), Room: g.room, MemTableBytes: 256 << 10, CacheBytes: 1 << 20})
	return err
}

func (g *fullRig) open() {
	g.t.Helper()
	if err := g.tryOpen(); err != nil {
		g.t.Fatal(err)
	}
}

func (g *fullRig) put(round int) {
	g.t.Helper()
	b := g.NewBatch()
	for i := range pairs {
		b.Set(keyOf(round, i), valueOf(round, i))
	}
	if err := g.Commit(b); err != nil {
		g.t.Fatal(err)
	}
}

// want asks for what put has written in a round.
func (g *fullRig) want(round int) {
	g.t.Helper()
	s := g.Snapshot()
	defer s.Close()
	for i := range pairs {
		got, ok, err := s.Get(nil, keyOf(round, i))
		if err != nil || !ok || !bytes.Equal(got, valueOf(round, i)) {
			g.t.Fatalf("round %d, %d: %d bytes, %v, %v", round, i, len(got), ok, err)
		}
	}
}

// fill leaves no room in the file system.
func (g *fullRig) fill() {
	sp, err := g.fs.Space("/")
	if err != nil {
		g.t.Fatal(err)
	}
	g.fs.SetCapacity(1<<50 - sp.FreeBytes)
}

// TestFullFileSystem: a file system that others have filled is not the end of the
// store. It draws on its reserve, then flushes wait; reads go on, a start works
// from what is left of the reserve, and when there is room again all goes on.
func TestFullFileSystem(t *testing.T) {
	t.Parallel()
	g := newFullRig(t)
	g.put(0)
	if err := g.Flush(); err != nil {
		t.Fatal(err)
	}
	g.fill()
	round := 0
	for !g.room.Stuck() {
		if round++; round > 200 {
			t.Fatal("the reserve has no end")
		}
		g.put(round)
		if err := g.Flush(); err != nil && !errors.Is(err, block.NoSpace) {
			t.Fatalf("flush in a full file system: %v", err)
		}
	}
	if round < 3 {
		t.Errorf("the reserve of %d bytes was used up by %d flushes", 1<<20, round)
	}
	if !g.room.Short() || g.room.Held() == 0 {
		t.Errorf("short %v, %d bytes are left to the next start", g.room.Short(), g.room.Held())
	}
	g.want(round) // from memory
	if err := g.Flush(); !errors.Is(err, block.NoSpace) {
		t.Errorf("another flush: %v", err)
	}

	// A start in the file system that is still full: what was flushed is there.
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.want(0)
	for at := 1; g.holds(at); at++ {
		g.want(at)
	}
	g.put(round + 1)

	// Room: the flush that waits ends by itself, and the reserve is whole again.
	g.fs.SetCapacity(0)
	for g.Flush() != nil {
		g.room.Retry()
	}
	g.room.Retry()
	if g.room.Short() || g.room.Held() != 1<<20 {
		t.Errorf("short %v, %d bytes held back when there is room", g.room.Short(), g.room.Held())
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.want(round + 1)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// holds tells whether the store knows of a round.
func (g *fullRig) holds(round int) bool {
	s := g.Snapshot()
	defer s.Close()
	_, ok, err := s.Get(nil, keyOf(round, 0))
	if err != nil {
		g.t.Fatal(err)
	}
	return ok
}

// TestFailedWriteIsFinal: after any write or sync that failed, of a manifest too,
// the store has failed (L8), and the process goes on.
func TestFailedWriteIsFinal(t *testing.T) {
	t.Parallel()
	broken := errors.New("input/output error")
	for _, tc := range []struct {
		name string
		op   vfs.Op
		file string
	}{
		{"sync of a table", vfs.OpSync, ".sst"},
		{"write of a table", vfs.OpWrite, ".sst"},
		{"sync of the manifest", vfs.OpSync, "MANIFEST"},
		{"write of the manifest", vfs.OpWrite, "MANIFEST"},
		{"sync of the folder", vfs.OpSyncDir, "index"},
		{"a sync that finds no room", vfs.OpSync, ".sst"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			g := newFullRig(t)
			g.put(0)
			if err := g.Flush(); err != nil {
				t.Fatal(err)
			}
			g.fs.SetRule(func(c vfs.Call) error {
				switch {
				case c.Op != tc.op || !strings.Contains(c.Name, tc.file):
					return nil
				case strings.HasSuffix(tc.name, "room"):
					return block.Errorf(block.NoSpace, "no space left on device")
				}
				return broken
			})
			g.put(1)
			if err := g.Flush(); err == nil || errors.Is(err, block.NoSpace) {
				t.Fatalf("flush: %v", err)
			}
			g.fs.SetRule(nil)
			if err := g.Flush(); err == nil {
				t.Fatal("a flush after a failed one succeeds")
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			g.open() // what was durable is
			if !g.holds(0) {
				t.Error("what was flushed before is gone")
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestDamagedIndexIsRefused: nothing is made anew in the place of what is damaged.
func TestDamagedIndexIsRefused(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		files string // that match are spoiled
		spoil func(fs *vfs.Sim, name string) error
		kind  block.Kind
		says  string
	}{
		{"marker of the manifest", "marker.manifest", func(fs *vfs.Sim, name string) error { return fs.Remove(name) }, block.Corrupt, "replace the disk"},
		{"a table", ".sst", func(fs *vfs.Sim, name string) error { return fs.Remove(name) }, block.Corrupt, "replace the disk"},
		{"manifest", "MANIFEST", func(fs *vfs.Sim, name string) error { return fs.Rot(name, 10, 20) }, block.Corrupt, "replace the disk"},
		{"newer format", "marker.format-version", func(fs *vfs.Sim, name string) error {
			return fs.Rename(name, "/disk/index/marker.format-version.000099.999")
		}, block.Unsupported, "start the build of Firn that wrote it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newFullRig(t)
			g.put(0)
			if err := g.Flush(); err != nil {
				t.Fatal(err)
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			names, err := g.fs.List("/disk/index")
			if err != nil {
				t.Fatal(err)
			}
			spoiled := 0
			for _, name := range names {
				if strings.Contains(name, tc.files) {
					spoiled++
					if err := tc.spoil(g.fs, "/disk/index/"+name); err != nil {
						t.Fatal(err)
					}
				}
			}
			before, err := g.fs.List("/disk/index")
			if err != nil || spoiled == 0 {
				t.Fatal(err, names)
			}
			for range 2 {
				err := g.tryOpen()
				if err == nil || block.KindOf(err) != tc.kind || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "\n") {
					t.Fatalf("open: %v", err)
				}
			}
			after, err := g.fs.List("/disk/index")
			if err != nil || strings.Join(after, " ") != strings.Join(before, " ") {
				t.Errorf("the folder held %v, then %v, %v", before, after, err)
			}
		})
	}
}
