package seglog

import (
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// What a rotten batch overwrote must not come back in the place of what it
// held (L4).
func TestRotBringsNothingBackThatWasOverwritten(t *testing.T) {
	t.Run("entries follow", func(t *testing.T) { rotOverwritten(t, true) })
	t.Run("a vote follows", func(t *testing.T) { rotOverwritten(t, false) })
}

func rotOverwritten(t *testing.T, more bool) {
	const segmentBytes = 128 << 10
	fs := vfs.NewSim(0)
	sb := Superblock{Disk: block.DiskID{1}, SegmentBytes: segmentBytes}
	if err := Format(fs, "/d", sb); err != nil {
		t.Fatal(err)
	}
	key := ReplicaKey{1, 1}
	open := func() (*Log, *loop.World, loop.Loop) {
		t.Helper()
		l, err := Open(fs, "/d", sb, Options{CapacityBytes: 12 * segmentBytes,
			Applied: func(ReplicaKey) (EntryID, bool) { return EntryID{10, 1}, true }})
		if err != nil {
			t.Fatal(err)
		}
		w := loop.NewWorld(1)
		lp := w.NewLoop(nil)
		lp.Post(func() { l.Start(lp, nil) })
		w.RunFor(time.Millisecond)
		return l, w, lp
	}
	l, w, lp := open()
	lp.Post(func() { l.Create(key, EntryID{10, 1}, HardState{Term: 1}, func(error) {}) })
	w.RunFor(time.Second)
	write := func(index, term uint64) int64 {
		at := int64(l.w.open[fresh].next) * block.Size
		ended := false
		lp.Post(func() {
			l.Replica(key).Append(Write{Entries: []Entry{{Term: term, Index: index, Data: []byte("x")}}, HardState: &HardState{Term: term}},
				func(err error) { ended = err == nil })
		})
		if w.RunFor(time.Second); !ended {
			t.Fatal("not written")
		}
		return at
	}
	write(11, 2)
	at := write(11, 3)
	if more {
		write(12, 3)
		write(13, 3)
	} else {
		lp.Post(func() { l.Replica(key).Append(Write{HardState: &HardState{Term: 4, Vote: 2}}, func(error) {}) })
		w.RunFor(time.Second)
	}
	lp.Post(func() { l.Close(func(error) {}) })
	w.RunFor(100 * time.Millisecond)
	if err := fs.Rot("/d/log/00000001.seg", at+16, 8); err != nil {
		t.Fatal(err)
	}
	l, _, _ = open()
	r := l.Replica(key)
	term, ok := r.Term(11)
	if r.Damaged() == "" && (!ok || term != 3) {
		t.Fatalf("entry 11 has term %d, %v, in a log of %d..%d that counts as whole", term, ok, r.FirstIndex(), r.LastIndex())
	}
}
