package seglog

import (
	"errors"
	"strings"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// A file of a segment whose making found no room, or was cut short, holds nothing:
// it needs no room when the log opens in a file system that is full.
func TestOpenInFullFileSystem(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, minSegmentBytes, 12)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.append(k, 11, 5, 4)
	g.run(time.Millisecond)
	g.loop.Kill()
	for id, size := range map[SegmentID]int64{10: 0, 11: 3 * block.Size} {
		f, err := g.fs.Open(segmentName(rigDir, id), vfs.Create, vfs.ClassLog)
		if err == nil {
			err = f.Allocate(0, size)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	sp, err := g.fs.Space("/")
	if err != nil {
		t.Fatal(err)
	}
	g.fs.SetCapacity(sp.TotalBytes - sp.FreeBytes)
	g.open()
	for id := SegmentID(10); id <= 11; id++ {
		if _, err := g.fs.Stat(segmentName(rigDir, id)); block.KindOf(err) != block.NotFound {
			t.Errorf("segment %d: %v", id, err)
		}
	}
}

// What a file system that is full leaves of a file is removed; a sync of it that
// fails is final, whatever its reason (L8).
func TestNewFileWithoutRoom(t *testing.T) {
	t.Parallel()
	for _, op := range []vfs.Op{vfs.OpSize, vfs.OpSync} {
		g := newRig(t, 1, minSegmentBytes, 40)
		g.open()
		k := ReplicaKey{1, 1}
		g.create(k)
		g.run(time.Second)
		made := g.log.filesMade()
		g.fs.SetRule(func(c vfs.Call) error {
			if c.Op == op && strings.HasSuffix(c.Name, ".seg") && c.Name > segmentName(rigDir, SegmentID(made)) {
				return block.Errorf(block.NoSpace, "no space left on device")
			}
			return nil
		})
		for i := range uint64(40) {
			if g.log.Err() == nil {
				g.append(k, 11+4*i, 5, 4)
				g.run(10 * time.Millisecond)
			}
		}
		if failed := g.log.Err() != nil; failed != (op == vfs.OpSync) {
			t.Errorf("op %d: %v", op, g.log.Err())
		}
		names, err := g.fs.List(rigDir + "/log")
		if err != nil || op == vfs.OpSize && len(names) != made {
			t.Errorf("op %d: %d files, %d have room: %v, %v", op, len(names), made, names, err)
		}
	}
}

// A batch that another build wrote in a format of its own is neither torn nor rotten.
func TestOtherFormatIsRefused(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"head", "newest", "rot"} {
		g, _, _, at := rotRig(t, nil)
		f, err := g.fs.Open(segmentName(rigDir, 1), 0, vfs.ClassLog)
		if err != nil {
			t.Fatal(err)
		}
		off := int64(0)
		if what != "head" {
			off = int64(at[len(at)-1]) * block.Size
		}
		p := make([]byte, block.Size)
		if _, err := f.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		le.PutUint16(p[4:], formatVersion+1)
		if what != "rot" {
			sealHeader(p[:le.Uint32(p[72:])])
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		err = g.tryOpen()
		if what == "rot" {
			if err != nil {
				t.Errorf("a version that has rotted: %v", err)
			}
			continue
		}
		if !errors.Is(err, block.Unsupported) || !strings.Contains(err.Error(), "has format 2 of the log, this build knows 1") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A log that the index knows to have been in use is not begun anew.
func TestLostLogIsRefused(t *testing.T) {
	t.Parallel()
	g, _, _, _ := rotRig(t, nil)
	if err := g.fs.RemoveAll(rigDir + "/log"); err != nil {
		t.Fatal(err)
	}
	o := g.options()
	o.Known = []ReplicaKey{{1, 1}}
	if _, err := Open(g.fs, rigDir, g.sb, o); err == nil || block.KindOf(err) != block.Corrupt || !strings.Contains(err.Error(), "put it back") {
		t.Errorf("a log that is gone: %v", err)
	}
	if _, err := Open(g.fs, rigDir, g.sb, g.options()); err != nil {
		t.Errorf("a new log: %v", err)
	}
}
