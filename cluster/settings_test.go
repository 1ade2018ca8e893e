package cluster

import (
	"errors"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

func (s *scripted) change(want Settings) *outcome {
	o := &outcome{}
	s.loop.Post(func() {
		s.client.StartSettings(s.t.Context(), s.vol.ID, want, func(_ meta.VolumeMeta, err error) { o.done(err) })
	})
	return o
}

// TestGrow: groups first, then the store, then the geometry (F8).
func TestGrow(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.loop.Post(func() {
		a.Watch(func() {
			for g := block.GroupID(1); g <= testGroups; g++ {
				if size := s.groups[g].record.Size; size != 5<<30 {
					t.Errorf("shown before group %d has it: %d", g, size)
				}
			}
			if size := s.volumeNow().SizeBytes; size != 5<<30 {
				t.Errorf("shown before the store has it: %d", size)
			}
		}, func(error) {})
	})
	s.script = func(q asked) bool {
		if size := a.Geometry().SizeBytes; size != 1<<30 {
			t.Errorf("geometry is %d while groups are told", size)
		}
		return false
	}
	o := s.change(Settings{SizeBytes: 5 << 30})
	s.until("grow", func() bool { return o.ended })
	s.script = nil
	if o.err != nil || a.Geometry().SizeBytes != 5<<30 {
		t.Fatalf("%v, %d", o.err, a.Geometry().SizeBytes)
	}
	if w := s.write(a, block.ChunkAt(4<<30), 0, 1); true {
		s.until("write", func() bool { return w.ended })
		if w.err != nil {
			t.Error(w.err)
		}
	}
}

// TestGrowIntoNewSpan waits for the coordinator and fences the new groups too.
func TestGrowIntoNewSpan(t *testing.T) {
	s := newScripted(t, 1<<40)
	a := s.attach()
	o := s.change(Settings{SizeBytes: 1<<40 + 4096})
	s.RunFor(5 * time.Second)
	if o.ended {
		t.Fatalf("%v", o.err)
	}
	if v := s.volumeNow(); v.WantBytes != 1<<40+4096 {
		t.Fatalf("wants %d", v.WantBytes)
	} else {
		v.Spans = append(v.Spans, []block.GroupID{5, 6, 7, 8})
		v.Layout++
		if _, err := s.store.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(meta.VolumeKey(v.ID), meta.EncodeVolume(v), 0)}}); err != nil {
			t.Fatal(err)
		}
	}
	s.until("grow", func() bool { return o.ended })
	if o.err != nil || a.Geometry().SizeBytes != 1<<40+4096 {
		t.Fatalf("%v", o.err)
	}
	for g := block.GroupID(1); g <= 8; g++ {
		if rec := s.groups[g].record; rec.Size != 1<<40+4096 || rec.Nonce != a.Owner().Nonce {
			t.Errorf("group %d: %+v", g, rec)
		}
	}
	w := s.write(a, block.ChunksPerSpan, 0, 1)
	s.until("write", func() bool { return w.ended })
	if w.err != nil || s.contentOps()[len(s.contentOps())-1].req.Group != 5 {
		t.Errorf("%v", w.err)
	}
}

// TestGrowKeepsANewName: what the groups keep of the volume (S8) has the name
// that it got while the change was under way.
func TestGrowKeepsANewName(t *testing.T) {
	s := newScripted(t, 1<<40)
	s.attach()
	o := s.change(Settings{SizeBytes: 1<<40 + 4096})
	s.until("wants", func() bool { return s.volumeNow().WantBytes != 0 })
	put := func(v meta.VolumeMeta) {
		t.Helper()
		if _, err := s.store.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(meta.VolumeKey(v.ID), meta.EncodeVolume(v), 0)}}); err != nil {
			t.Fatal(err)
		}
	}
	v := s.volumeNow()
	v.Name = "renamed"
	put(v)
	s.RunFor(time.Second)
	v = s.volumeNow()
	v.Spans = append(v.Spans, []block.GroupID{5, 6, 7, 8})
	v.Layout++
	put(v)
	fences := 0
	s.script = func(q asked) bool {
		if q.req.Command.Type == wire.CmdFence {
			fences++
			if kept, err := meta.DecodeVolume(meta.KV{Key: meta.VolumeKey(v.ID), Value: q.req.Command.VolumeValue, Modified: 1}); err != nil || kept.Name != "renamed" {
				t.Errorf("group %d is told the name %q: %v", q.req.Group, kept.Name, err)
			}
		}
		return false
	}
	s.until("grow", func() bool { return o.ended })
	if o.err != nil || fences < 8 {
		t.Errorf("%v, %d fences", o.err, fences)
	}
}

// TestShrink: nothing new beyond the end, what is in flight there first, then
// zeros, then the groups' size, then the store.
func TestShrink(t *testing.T) {
	const old, size = 64<<20 + 8192, 21<<20 + 4096
	s := newScripted(t, old)
	a := s.attach()
	var held asked
	s.script = func(q asked) bool {
		if q.req.Command.Type == wire.CmdWrite {
			held = q
			return true
		}
		return false
	}
	w := s.write(a, 10, 0, 1)
	s.RunFor(10 * time.Millisecond)
	before := len(s.log)
	o := s.change(Settings{SizeBytes: size, Shrink: true})
	s.RunFor(500 * time.Millisecond)
	if o.ended || len(s.log) != before {
		t.Fatalf("did not wait for a write in flight beyond the end: %v", o.err)
	}
	late := s.write(a, 10, 5, 1)
	s.until("late write", func() bool { return late.ended })
	if !errors.Is(late.err, block.OutOfRange) || a.Geometry().SizeBytes != size {
		t.Errorf("%v", late.err)
	}
	answer1(held, wire.OutcomeApplied)
	s.script = nil
	s.until("shrink", func() bool { return o.ended && w.ended })
	if o.err != nil || w.err != nil || s.volumeNow().SizeBytes != size {
		t.Fatalf("%v, %v", o.err, w.err)
	}
	fenced, zeroed, marked := false, false, map[block.GroupID]bool{}
	for _, q := range s.log[before:] {
		if q.node != s.groups[q.req.Group].leader {
			continue
		}
		switch c := q.req.Command; c.Type {
		case wire.CmdFence:
			fenced = true
			if !zeroed || len(marked) != testGroups {
				t.Error("groups were told the size before the rest was zero")
			}
		case wire.CmdZero:
			zeroed = true
			if c.Chunk != 5 || c.Block != 257 || c.Count != 1024-257 {
				t.Errorf("zero %+v", c)
			}
		case wire.CmdMark:
			marked[q.req.Group] = true
			if c.Chunk != 6 || c.ToChunk != 17 {
				t.Errorf("mark %+v", c)
			}
		}
	}
	if !fenced {
		t.Error("no group was told")
	}
}

func TestSettingsRefused(t *testing.T) {
	s := newScripted(t, 1<<30)
	yes := true
	for name, c := range map[string]struct {
		want Settings
		kind block.Kind
	}{
		"shrink without leave": {Settings{SizeBytes: 4096}, block.Invalid},
		"no multiple":          {Settings{SizeBytes: 4097}, block.Invalid},
		"half a block":         {Settings{SizeBytes: 512, Shrink: true}, block.Invalid},
		"too large":            {Settings{SizeBytes: meta.MaxVolumeBytes + 512}, block.Invalid},
	} {
		o := s.change(c.want)
		s.until("change", func() bool { return o.ended })
		if !errors.Is(o.err, c.kind) {
			t.Errorf("%s: %v", name, o.err)
		}
	}
	// Without an owner the volume is attached for it, and free afterwards.
	o := s.change(Settings{ReadOnly: &yes})
	s.until("read-only", func() bool { return o.ended })
	if o.err != nil || !s.volumeNow().ReadOnly || !s.groups[1].record.ReadOnly {
		t.Errorf("%v", o.err)
	}
	if owners, err := meta.ListOwners(t.Context(), s.store); err != nil || len(owners) != 0 {
		t.Errorf("%v %v", owners, err)
	}
	o = s.change(Settings{SizeBytes: 1 << 20, Shrink: true})
	s.until("shrink", func() bool { return o.ended })
	if !errors.Is(o.err, block.ReadOnly) {
		t.Errorf("%v", o.err)
	}
	// Another gateway's volume is left alone.
	other := s.newClient("other", "elsewhere")
	if _, err := s.tryAttach(other); err != nil {
		t.Fatal(err)
	}
	o = s.change(Settings{SizeBytes: 2 << 30})
	s.until("grow", func() bool { return o.ended })
	if !errors.Is(o.err, block.Busy) {
		t.Errorf("%v", o.err)
	}
}

// TestSettingsSurviveTheStore: while the store is away the change waits, and is
// finished when it is back.
func TestSettingsSurviveTheStore(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.script = func(q asked) bool {
		if q.req.Command.Type == wire.CmdFence {
			s.mem.SetDown(true)
		}
		return false
	}
	o := s.change(Settings{SizeBytes: 2 << 30})
	s.RunFor(20 * time.Second)
	if o.ended || a.Geometry().SizeBytes != 1<<30 {
		t.Fatalf("%v", o.err)
	}
	s.script = nil
	s.mem.SetDown(false)
	s.until("grow", func() bool { return o.ended })
	if o.err != nil || a.Geometry().SizeBytes != 2<<30 || s.volumeNow().SizeBytes != 2<<30 {
		t.Errorf("%v", o.err)
	}
}
