package cluster

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// TestAttachFencesEveryGroupFirst (F1).
func TestAttachFencesEveryGroupFirst(t *testing.T) {
	s := newScripted(t, 1<<30)
	blocked := block.GroupID(3)
	s.script = func(q asked) bool { return q.req.Group == blocked }
	attached := false
	s.loop.Post(func() {
		s.client.StartAttach(t.Context(), s.vol.ID, func(a *Attachment, err error) { attached = err == nil })
	})
	s.RunFor(5 * time.Second)
	if attached {
		t.Fatal("attached without a Fence in every group")
	}
	blocked = 0
	s.until("attach", func() bool { return attached })
	a := s.client.attachments[s.vol.ID]
	for g := block.GroupID(1); g <= testGroups; g++ {
		if rec := s.groups[g].record; rec.Epoch != 1 || rec.Nonce != a.Owner().Nonce || rec.Size != 1<<30 {
			t.Errorf("group %d has %+v", g, rec)
		}
	}
	for _, st := range a.streams {
		if st.token != block.MakeVersion(0, s.groups[st.group.id].index) {
			t.Errorf("token %v of group %d is not its Fence's", st.token, st.group.id)
		}
	}
}

// TestAttachNamesGroupsWithoutMajority: it ends before its caller does, with what
// to do, and the volume is free for another try.
func TestAttachNamesGroupsWithoutMajority(t *testing.T) {
	s := newScripted(t, 1<<30)
	s.script = func(q asked) bool { return q.req.Group == 2 || q.req.Group == 3 }
	began := s.Now()
	o := &outcome{}
	s.loop.Post(func() {
		s.client.StartAttach(t.Context(), s.vol.ID, func(a *Attachment, err error) { o.done(err) })
	})
	s.until("the end of the attempt", func() bool { return o.ended })
	if took := s.Now().Sub(began); took > 12*time.Second {
		t.Errorf("it took %v", took)
	}
	if !errors.Is(o.err, block.Unavailable) || !strings.Contains(o.err.Error(), "2 of its") || !strings.Contains(o.err.Error(), "(2 3)") || !strings.Contains(o.err.Error(), "no majority") {
		t.Errorf("%v", o.err)
	}
	s.script = nil
	s.attach()
}

func TestAttachGivesUpWithItsCaller(t *testing.T) {
	s := newScripted(t, 1<<30)
	s.script = func(q asked) bool { return true }
	ctx, cancel := context.WithCancel(t.Context())
	o := &outcome{}
	s.loop.Post(func() {
		s.client.StartAttach(ctx, s.vol.ID, func(a *Attachment, err error) { o.done(err) })
	})
	s.RunFor(2 * time.Second)
	cancel()
	s.RunFor(2 * time.Second)
	if !errors.Is(o.err, block.Canceled) {
		t.Fatalf("%v", o.err)
	}
	if owners, err := meta.ListOwners(t.Context(), s.store); err != nil || len(owners) != 0 {
		t.Errorf("owners %v, %v", owners, err)
	}
	s.script = nil
	s.attach()
}

// TestOwners: a live owner is never robbed, a dead one only after its lease, one
// of the same folder at once.
func TestOwners(t *testing.T) {
	s := newScripted(t, 1<<30)
	first := s.attach()
	var why error
	s.loop.Post(func() { first.Watch(func() {}, func(err error) { why = err }) })
	other := s.newClient("other", "elsewhere")
	if _, err := s.tryAttach(other); !errors.Is(err, block.Busy) || !strings.Contains(err.Error(), "gw") || !strings.Contains(err.Error(), "`firn detach vol`") {
		t.Fatalf("%v", err)
	}
	if first.Err() != nil {
		t.Fatal(first.Err())
	}
	// The same gateway starts again: its key is replaced, the old process is fenced.
	began := s.Now()
	again := s.newClient("gw", "folder")
	second, err := s.tryAttach(again)
	if err != nil || s.Now().Sub(began) > time.Second {
		t.Fatalf("%v after %v", err, s.Now().Sub(began))
	}
	if second.Owner().Epoch != first.Owner().Epoch+1 {
		t.Errorf("epochs %d and %d", first.Owner().Epoch, second.Owner().Epoch)
	}
	o := s.write(first, 0, 0, 1)
	s.until("the old one's end", func() bool { return o.ended && why != nil })
	if !errors.Is(o.err, block.Fenced) || !errors.Is(why, block.Fenced) || first.Err() == nil {
		t.Errorf("%v, %v", o.err, why)
	}
	// A dead owner's key goes with its lease.
	s.loop.Post(func() { again.session.Stop(func(error) {}) })
	began = s.Now()
	if _, err := s.tryAttach(other); err != nil || s.Now().Sub(began) > 5*time.Second {
		t.Errorf("%v after %v", err, s.Now().Sub(began))
	}
}

// TestForcedOwnerHearsOfIt: the one that was robbed ends soon, and the taker
// waits for a lease's time.
func TestForcedOwnerHearsOfIt(t *testing.T) {
	s := newScripted(t, 1<<30)
	first := s.attach()
	if _, err := meta.ForceOwner(t.Context(), s.store, s.vol.ID); err != nil {
		t.Fatal(err)
	}
	s.until("the end", func() bool { return first.Err() != nil })
	if !errors.Is(first.Err(), block.Fenced) {
		t.Errorf("%v", first.Err())
	}
	began := s.Now()
	other := s.newClient("other", "elsewhere")
	a, err := s.tryAttach(other)
	if err != nil {
		t.Fatal(err)
	}
	if waited := s.Now().Sub(began); waited < meta.OwnerTTL {
		t.Errorf("exported after %v", waited)
	}
	if s.volumeNow().Forced {
		t.Error("the mark of force is left")
	}
	_ = a
}

// TestStoreBehind: the groups know a higher epoch than the store, which was
// restored from a backup: the new owner goes above it, and waits.
func TestStoreBehind(t *testing.T) {
	s := newScripted(t, 1<<30)
	for g := block.GroupID(1); g <= testGroups; g++ {
		s.groups[g].known = true
		s.groups[g].record = wire.VolumeRecord{Volume: s.vol.ID, Epoch: block.Epoch(10 + g), Nonce: 5, Size: 1 << 30, Settings: 1}
	}
	began := s.Now()
	a := s.attach()
	if e := a.Owner().Epoch; e <= 10+testGroups || s.volumeNow().Epoch != e {
		t.Errorf("epoch %d, in the store %d", e, s.volumeNow().Epoch)
	}
	if s.Now().Sub(began) < meta.OwnerTTL {
		t.Error("did not wait")
	}
}

// TestSettingsOfADeadOwnerAreAdopted: one group has a newer size (S8).
func TestSettingsOfADeadOwnerAreAdopted(t *testing.T) {
	s := newScripted(t, 1<<30)
	s.groups[2].known = true
	s.groups[2].record = wire.VolumeRecord{Volume: s.vol.ID, Size: 3 << 30, Settings: 9, ReadOnly: true}
	a := s.attach()
	if g := a.Geometry(); g.SizeBytes != 3<<30 || !g.ReadOnly {
		t.Errorf("%+v", g)
	}
	if v := s.volumeNow(); v.SizeBytes != 3<<30 || v.Settings != 9 {
		t.Errorf("%+v", v)
	}
	for g := block.GroupID(1); g <= testGroups; g++ {
		if s.groups[g].record.Size != 3<<30 {
			t.Errorf("group %d has size %d", g, s.groups[g].record.Size)
		}
	}
}

// TestLeaseLost: after the store forgot the lease, the owner key is written
// again under the same epoch, and the attachment goes on.
func TestLeaseLost(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	epoch := a.Owner().Epoch
	if err := s.store.Revoke(t.Context(), s.client.lease); err != nil {
		t.Fatal(err)
	}
	s.until("the loss", func() bool { return !a.current() })
	o := s.write(a, 0, 0, 1)
	s.until("the lease and the write", func() bool { return a.current() && o.ended })
	owners, err := meta.ListOwners(t.Context(), s.store)
	if err != nil || owners[s.vol.ID].Nonce != a.Owner().Nonce || a.Owner().Epoch != epoch || o.err != nil || a.Err() != nil {
		t.Errorf("%v %v %v %v", owners, err, o.err, a.Err())
	}
}

// TestRefence: groups refuse the epoch although the store says that the volume
// is still ours. What is pending is sent anew, the same bytes under new numbers,
// and nothing is answered before (W4).
func TestRefence(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	old := a.Owner()
	for range 10 {
		o := s.write(a, 0, 0, 1)
		s.until("write", func() bool { return o.ended })
	}
	for g := block.GroupID(1); g <= testGroups; g++ {
		s.groups[g].record.Epoch, s.groups[g].record.Nonce = old.Epoch+3, 99
	}
	s.log = nil
	var outs []*outcome
	for i := range 20 {
		outs = append(outs, s.write(a, block.Chunk(i%3), block.Index(i), byte(i)))
	}
	s.until("all", func() bool {
		for _, o := range outs {
			if !o.ended {
				return false
			}
		}
		return true
	})
	if a.Owner().Epoch <= old.Epoch+3 || a.Owner().Nonce != old.Nonce || a.Err() != nil {
		t.Errorf("owner %+v after %+v", a.Owner(), old)
	}
	for _, o := range outs {
		if o.err != nil {
			t.Error(o.err)
		}
	}
	bytesOf := map[[2]int][]byte{}
	newest := map[block.GroupID]block.OpSeq{}
	for _, q := range s.contentOps() {
		c := q.req.Command
		key := [2]int{int(c.Chunk), int(c.Block)}
		if was, ok := bytesOf[key]; ok && !bytes.Equal(was, q.data) {
			t.Errorf("block %v was sent with other bytes", key)
		}
		bytesOf[key] = q.data
		if c.Epoch == a.Owner().Epoch {
			newest[q.req.Group] = max(newest[q.req.Group], c.OpSeq)
		}
	}
	for g, n := range newest {
		if n > 7 {
			t.Errorf("group %d: opSeq %d under the new epoch", g, n)
		}
	}
}

// TestRefenceWithdrawsOldAttempts: what was in flight under the old epoch is sent
// under the new one, and the old attempt's late answer ends nothing.
func TestRefenceWithdrawsOldAttempts(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	old := a.Owner().Epoch
	var held []asked
	s.script = func(q asked) bool {
		if c := q.req.Command; c.OpSeq != 0 && q.req.Group == 1 {
			held = append(held, q)
			return true
		}
		return false
	}
	slow := s.write(a, 0, 0, 1)
	s.until("the slow write", func() bool { return len(held) == 1 })
	s.groups[2].record.Epoch++
	s.groups[2].record.Nonce++
	other := s.write(a, 1, 0, 1)
	s.until("the new epoch", func() bool { return other.ended && len(held) == 2 })
	if now := held[1].req.Command; now.Epoch <= old || now.OpSeq != 1 || !bytes.Equal(held[0].data, held[1].data) {
		t.Errorf("sent again as %+v", now)
	}
	answer1(held[0], wire.OutcomeOldEpoch)
	s.RunFor(100 * time.Millisecond)
	if slow.ended || a.contested {
		t.Error("a late answer under the old epoch counted")
	}
	answer1(held[1], wire.OutcomeApplied)
	s.until("the slow write", func() bool { return slow.ended })
	if slow.err != nil || a.stream(0).floor != 2 {
		t.Errorf("%v, floor %d", slow.err, a.stream(0).floor)
	}
}

// TestDeletedVolume: tombstones in the groups and no volume in the store end the
// attachment; a store that merely lacks the volume does not.
func TestDeletedVolume(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	if _, err := s.store.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(meta.VolumeKey(s.vol.ID)), meta.Delete(meta.OwnerKey(s.vol.ID))}}); err != nil {
		t.Fatal(err)
	}
	s.RunFor(5 * time.Second)
	o := s.write(a, 0, 0, 1)
	s.until("write", func() bool { return o.ended })
	if o.err != nil || a.Err() != nil {
		t.Fatalf("%v, %v", o.err, a.Err())
	}
	s.script = func(q asked) bool {
		answer1(q, wire.OutcomeNoVolume)
		return true
	}
	o = s.write(a, 0, 0, 1)
	s.until("write", func() bool { return o.ended })
	if !errors.Is(o.err, block.Fenced) {
		t.Errorf("%v", o.err)
	}
}

func TestCloseFreesTheVolume(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.script = func(q asked) bool { return q.req.Kind == wire.ReqRead || q.req.Command.OpSeq != 0 }
	o, r := s.write(a, 0, 0, 1), s.read(t.Context(), a, 0, 0, 1)
	s.RunFor(time.Second)
	c := &outcome{}
	s.loop.Post(func() { a.Close(c.done) })
	s.until("close", func() bool { return c.ended && o.ended && r.ended })
	if c.err != nil || !errors.Is(o.err, block.Canceled) || !errors.Is(r.err, block.Canceled) {
		t.Errorf("%v, %v, %v", c.err, o.err, r.err)
	}
	if len(s.client.calls) != 0 {
		t.Error("calls are left")
	}
	s.script = nil
	if _, err := s.tryAttach(s.newClient("other", "elsewhere")); err != nil {
		t.Error(err)
	}
}

func TestRenameIsSeen(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	told := 0
	s.loop.Post(func() { a.Watch(func() { told++ }, func(error) {}) })
	if _, err := meta.RenameVolume(t.Context(), s.store, "vol", "disk"); err != nil {
		t.Fatal(err)
	}
	s.until("the name", func() bool { return told > 0 })
	if a.Geometry().Name != "disk" {
		t.Error(a.Geometry().Name)
	}
}

func TestDeleteInGroup(t *testing.T) {
	s := newScripted(t, 1<<30)
	first := true
	s.script = func(q asked) bool {
		if first {
			first = false
			return true
		}
		return false
	}
	o := &outcome{}
	s.loop.Post(func() { s.client.DeleteInGroup(t.Context(), s.vol, 2, o.done) })
	s.until("delete", func() bool { return o.ended })
	if o.err != nil || !s.groups[2].record.Tombstone {
		t.Errorf("%v", o.err)
	}
}
