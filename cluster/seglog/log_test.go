package seglog

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

func TestAnEntryTakesSixteenBytes(t *testing.T) {
	if n := unsafe.Sizeof(slot{}); n != 16 {
		t.Fatalf("%d bytes", n)
	}
}

// TestOneSyncPerTurn gathers the writes of a turn, and of the time that a sync
// takes, into one batch each.
func TestOneSyncPerTurn(t *testing.T) {
	g := newRig(t, 1, 1<<20, 12)
	g.open()
	var keys []ReplicaKey
	for i := range 20 {
		keys = append(keys, ReplicaKey{block.GroupID(i + 1), 1})
		g.create(keys[i])
	}
	g.run(20 * time.Millisecond)
	before, syncs := g.log.Stats(), g.fs.Counts(vfs.ClassLog).Syncs
	g.loop.Post(func() {
		for _, k := range keys {
			g.log.Replica(k).Append(Write{Entries: []Entry{{Term: 5, Index: 11, Data: []byte("x")}}}, func(error) {
				// An answer that brings the next write.
				g.log.Replica(k).Append(Write{Entries: []Entry{{Term: 5, Index: 12, Data: []byte("y")}}}, func(error) {})
			})
		}
	})
	g.run(20 * time.Millisecond)
	after := g.log.Stats()
	if after.Batches-before.Batches != 2 || after.Entries-before.Entries != 40 || g.fs.Counts(vfs.ClassLog).Syncs-syncs != 2 {
		t.Fatalf("%d batches, %d entries, %d syncs", after.Batches-before.Batches, after.Entries-before.Entries, g.fs.Counts(vfs.ClassLog).Syncs-syncs)
	}
}

// TestShapesOfWrites writes what is unusual: no payload, no data, a payload that
// ends within a block, the largest of both, only a hard state, many at once.
func TestShapesOfWrites(t *testing.T) {
	g := newRig(t, 1, 8<<20, 12)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.run(time.Millisecond)
	fill := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(i*7 + n)
		}
		return p
	}
	shapes := []struct{ data, payload int }{{0, 0}, {100, 0}, {0, 1}, {130, 4096}, {130, 4097}, {1200, block.MaxEntryBytes}, {MaxDataBytes, 0},
		{MaxDataBytes, block.MaxEntryBytes}, {5, 12288}}
	for range 6 {
		shapes = append(shapes, struct{ data, payload int }{1200, block.MaxEntryBytes}) // more than one batch, and one segment
	}
	var w Write
	for i, s := range shapes {
		e := Entry{Term: 5, Index: uint64(11 + i), Data: fill(s.data)}
		if s.payload > 0 {
			e.Payload = payload.Copy(fill(s.payload))
		}
		w.Entries = append(w.Entries, e)
	}
	w.HardState = &HardState{6, 1, 12}
	acked := 0
	g.loop.Post(func() {
		g.log.Replica(k).Append(w, func(err error) {
			if err != nil {
				t.Error(err)
			}
			acked++
		})
		g.log.Replica(k).Append(Write{HardState: &HardState{7, 2, 12}}, func(error) { acked++ })
		g.log.Replica(k).Append(Write{}, func(error) { acked++ })
	})
	g.run(time.Second)
	if acked != 3 {
		t.Fatalf("%d of 3 writes were answered", acked)
	}
	for range 2 {
		r := g.log.Replica(k)
		if r.HardState() != (HardState{7, 2, 12}) || r.LastIndex() != uint64(10+len(shapes)) {
			t.Fatalf("%+v, %d", r.HardState(), r.LastIndex())
		}
		i := 0
		for i < len(shapes) {
			entries, err := r.Read(uint64(11+i), 1000, 1<<20, true)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				var p []byte
				if e.Payload != nil {
					p = e.Payload.Bytes()
				}
				if !bytes.Equal(e.Data, fill(shapes[i].data)) || !bytes.Equal(p, fill(shapes[i].payload)) {
					t.Fatalf("entry %d came back as %d and %d bytes", i, len(e.Data), len(p))
				}
				i++
			}
		}
		g.close()
		if err := g.tryOpen(); err != nil {
			t.Fatal(err)
		}
		g.start2()
	}
}

func TestReadBounds(t *testing.T) {
	g := newRig(t, 1, 1<<20, 12)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.append(k, 11, 5, 8)
	g.run(10 * time.Millisecond)
	r := g.log.Replica(k)
	if e, err := r.Read(11, 19, 1, true); err != nil || len(e) != 1 {
		t.Fatalf("%d entries, %v: one must come whatever its size", len(e), err)
	}
	if e, err := r.Read(12, 15, 1<<20, false); err != nil || len(e) != 3 || e[0].Payload != nil {
		t.Fatalf("%d entries, %v", len(e), err)
	}
	for _, lo := range []uint64{10, 19, 5} {
		if _, err := r.Read(lo, 30, 1<<20, true); block.KindOf(err) != block.Unavailable {
			t.Fatalf("entry %d, which is not there: %v", lo, err)
		}
	}
	if _, _, ok := r.Locate(19); ok {
		t.Fatal("an entry that is not there has a place")
	}
}

// TestPinsKeepSegments holds a pin over truncation and checkpoint: what could
// be read stays readable, and its segment is used again only afterwards.
func TestPinsKeepSegments(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 24)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.append(k, 11, 5, 6)
	g.run(10 * time.Millisecond)
	g.apply(k)
	old := map[blockKey]blockAt{}
	for b, at := range g.index.now.blocks {
		old[b] = at
	}
	var release func()
	g.loop.Post(func() { release = g.log.Pin() })
	g.run(time.Millisecond)
	overwrite := func(rounds int) {
		for range rounds {
			s := g.reps[k].now()
			g.append(k, s.last()+1, 5, 8)
			g.run(2 * time.Millisecond)
			g.apply(k)
			g.checkpoint()
			g.truncate(k, 0)
			g.run(2 * time.Millisecond)
		}
	}
	overwrite(25)
	for b, at := range old {
		p := payload.New(block.Size)
		if err := g.log.ReadBlocks(at.loc, p.Bytes()); err != nil {
			t.Fatal(err)
		}
		_, n, _ := shape(k, at.id)
		if !bytes.Equal(p.Bytes(), content(k, at.id, n)[at.k*block.Size:(at.k+1)*block.Size]) {
			t.Fatalf("block %v was overwritten under a pin", b)
		}
	}
	held := g.log.Space()
	if held.Pins != 1 {
		t.Fatalf("%+v", held)
	}
	release()
	overwrite(2)
	if sp := g.log.Space(); sp.ReusedBytes <= held.ReusedBytes || sp.Pins != 0 {
		t.Fatalf("nothing was freed after the pin was: %+v, %+v", held, sp)
	}
}

// TestIdleDiskIsPrepared zeroes spares while nobody writes, and gives back what
// it does not need.
func TestIdleDiskIsPrepared(t *testing.T) {
	g := newRig(t, 1, 2<<20, 100)
	g.open()
	g.run(time.Second)
	st := g.log.Stats()
	if st.ZeroedBytes != spareFiles*2<<20 {
		t.Fatalf("zeroed %d bytes", st.ZeroedBytes)
	}
	writes := g.fs.Counts(vfs.ClassLog).Writes
	g.run(time.Hour)
	if g.fs.Counts(vfs.ClassLog).Writes != writes {
		t.Fatal("an idle disk is written")
	}
	k := ReplicaKey{1, 1}
	g.create(k)
	for range 300 {
		s := g.reps[k].now()
		g.append(k, s.last()+1, 5, 20)
		g.run(2 * time.Millisecond)
	}
	peak := g.log.Space().FileBytes
	g.apply(k)
	g.checkpoint()
	g.truncate(k, 0)
	g.run(time.Second)
	g.checkpoint()
	g.run(5 * time.Second)
	if sp := g.log.Space(); sp.FileBytes >= peak || sp.FileBytes > 12*2<<20 {
		t.Fatalf("%d bytes of files after %d at most, of them free %d", sp.FileBytes, peak, sp.FreeBytes)
	}
	g.close()
	g.open()
	g.verify()
}

// TestFullFileSystem lets the file system run out of room before the capacity
// is reached: writes wait, nothing fails, and freed segments are used again.
func TestFullFileSystem(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 100)
	g.fs.SetCapacity(10*minSegmentBytes + 100000)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	for range 40 {
		s := g.reps[k].now()
		g.append(k, s.last()+1, 5, 8)
		g.run(5 * time.Millisecond)
		g.apply(k)
		g.checkpoint()
		g.truncate(k, 0)
		g.run(5 * time.Millisecond)
	}
	g.run(time.Second)
	if m := g.reps[k]; g.failed != nil || m.acked != len(m.writes) {
		t.Fatalf("%v, %d of %d writes answered", g.failed, m.acked, len(m.writes))
	}
	g.verify()
}

func TestOpenRefusesTooSmallADisk(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, minSegments-1)
	if err := g.tryOpen(); block.KindOf(err) != block.Invalid || !strings.Contains(err.Error(), "too small") {
		t.Fatal(err)
	}
}

// TestOverTheMachine runs the log on real files and a real loop, with readers
// beside the writer.
func TestOverTheMachine(t *testing.T) {
	fs, dir := vfs.NewOS(), t.TempDir()
	sb := Superblock{Cluster: block.ClusterID{1}, Disk: block.DiskID{2}, SegmentBytes: 4 << 20}
	if err := Format(fs, dir, sb); err != nil {
		t.Fatal(err)
	}
	k := ReplicaKey{1, 1}
	last := uint64(10)
	for range 2 {
		l, err := Open(fs, dir, sb, Options{CapacityBytes: 64 << 20})
		if err != nil {
			t.Fatal(err)
		}
		s := loop.NewSystem(clock.System{}, loop.DefaultLimits)
		s.Call(func() {
			l.Start(s, nil)
			if l.Replica(k) == nil {
				l.Create(k, EntryID{10, 5}, HardState{}, func(error) {})
			}
		})
		r := l.Replica(k)
		if r.LastIndex() != last {
			t.Fatalf("the log ends at %d, want %d", r.LastIndex(), last)
		}
		var readers sync.WaitGroup
		for round := range 60 {
			var done sync.WaitGroup
			done.Add(20)
			s.Call(func() {
				for range 20 {
					last++
					e := Entry{Term: 5, Index: last, Data: []byte("data"), Payload: payload.Copy(content(k, EntryID{last, 5}, 8192))}
					r.Append(Write{Entries: []Entry{e}}, func(err error) {
						if err != nil {
							t.Error(err)
						}
						done.Done()
					})
					e.Payload.Release()
				}
				if round%8 == 7 {
					r.Append(Write{Truncate: &EntryID{last - 100, 5}}, func(error) {})
				}
			})
			done.Wait()
			from := last - 19
			readers.Add(1)
			go func() {
				defer readers.Done()
				entries, err := r.Read(from, from+20, 1<<20, true)
				if err != nil || len(entries) != 20 {
					t.Errorf("%d entries from %d: %v", len(entries), from, err)
				}
				for _, e := range entries {
					if !bytes.Equal(e.Payload.Bytes(), content(k, EntryID{e.Index, 5}, 8192)) {
						t.Errorf("entry %d is not what was written", e.Index)
					}
					e.Payload.Release()
				}
			}()
		}
		readers.Wait()
		closed := make(chan error, 1)
		s.Call(func() { l.Close(func(err error) { closed <- err }) })
		if err := <-closed; err != nil {
			t.Fatal(err)
		}
		// A closed log has not lost what it held.
		if err := l.ReadBlocks(Location{1, 1}, payload.New(block.Size).Bytes()); block.KindOf(err) != block.Unavailable {
			t.Errorf("blocks of a closed log: %v", err)
		}
		if _, err := l.Replica(l.Replicas()[0]).Read(1, 2, 1, false); block.KindOf(err) != block.Unavailable {
			t.Errorf("entries of a closed log: %v", err)
		}
		s.Stop()
	}
}
