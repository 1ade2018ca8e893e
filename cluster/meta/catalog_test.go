package meta_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

var ctx = context.Background()

// fixture is a store in a world of its own, with registered nodes.
type fixture struct {
	*testing.T
	world *loop.World
	mem   *meta.Mem
	s     *meta.MemClient
	next  byte
}

func newFixture(t *testing.T, nodes int) *fixture {
	w := loop.NewWorld(1)
	f := &fixture{T: t, world: w, mem: meta.NewMem(w.NewLoop(nil))}
	f.s = f.mem.Client()
	for i := range nodes {
		_, err := meta.RegisterNode(ctx, f.s, f.registration(block.NodeID(i+1), uint64(i+1)), f.lease(time.Hour))
		f.ok(err)
	}
	return f
}

func (f *fixture) ok(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) want(err error, k block.Kind, text string) {
	f.Helper()
	if err == nil || !errors.Is(err, k) || !strings.Contains(err.Error(), text) {
		f.Fatalf("got %v, want kind %q with %q", err, k, text)
	}
}

func (f *fixture) id() (u [16]byte) {
	f.next++
	u[0] = f.next
	return block.MarkUUID(u)
}

func (f *fixture) lease(ttl time.Duration) meta.LeaseID {
	f.Helper()
	id, err := f.s.Grant(ctx, ttl)
	f.ok(err)
	return id
}

func (f *fixture) registration(n block.NodeID, incarnation uint64) meta.Registration {
	return meta.Registration{
		Node: meta.NodeMeta{ID: n, Addr: fmt.Sprintf("n%d:7410", n), Disks: []meta.DiskMeta{{ID: block.DiskID{byte(n)}, CapacityBytes: 1 << 40}}},
		Boot: "boot-a", Incarnation: incarnation,
	}
}

func (f *fixture) create(name string) meta.VolumeMeta {
	f.Helper()
	v, err := meta.CreateVolume(ctx, f.s, meta.NewVolume{ID: f.id(), Name: name, SizeBytes: 1 << 30})
	f.ok(err)
	return v
}

// ready creates a volume and lays it out, as a coordinator does.
func (f *fixture) ready(name string) meta.VolumeMeta {
	f.Helper()
	v := f.create(name)
	g, won, err := meta.Campaign(ctx, f.s, 1, uint64(f.next)+1000, f.lease(time.Hour))
	f.ok(err)
	if !won {
		f.Fatal("not elected")
	}
	v, _, err = meta.ChangeVolume(ctx, f.s, g, v.ID, func(v *meta.VolumeMeta) bool {
		v.Spans, v.State, v.Layout = [][]block.GroupID{{1, 2, 3, 4}}, meta.Ready, 1
		return true
	})
	f.ok(err)
	f.ok(meta.Resign(ctx, f.s, g))
	return v
}

func TestClusterIsWrittenOnce(t *testing.T) {
	f := newFixture(t, 0)
	_, err := meta.GetCluster(ctx, f.s)
	f.want(err, block.NotFound, "no cluster")
	first, second := block.ClusterID(f.id()), block.ClusterID(f.id())
	for _, id := range []block.ClusterID{first, second} {
		c, err := meta.InitCluster(ctx, f.s, id)
		f.ok(err)
		if c.ID != first {
			t.Fatalf("the cluster became %v", c.ID)
		}
	}
}

func TestCreateVolumeRefuses(t *testing.T) {
	f := newFixture(t, 2)
	base := meta.NewVolume{ID: f.id(), Name: "ok", SizeBytes: 1 << 20}
	f.create("taken")
	cases := []struct {
		why  string
		kind block.Kind
		text string
		edit func(*meta.NewVolume)
	}{
		{"size 0", block.Invalid, "above 0", func(n *meta.NewVolume) { n.SizeBytes = 0 }},
		{"negative size", block.Invalid, "above 0", func(n *meta.NewVolume) { n.SizeBytes = -512 }},
		{"no multiple", block.Invalid, "no multiple of the block size 512", func(n *meta.NewVolume) { n.SizeBytes = 1000 }},
		{"no multiple of 4096", block.Invalid, "no multiple of the block size 4096", func(n *meta.NewVolume) { n.SizeBytes, n.BlockSize = 512, 4096 }},
		{"too large", block.Invalid, "the largest is", func(n *meta.NewVolume) { n.SizeBytes = meta.MaxVolumeBytes + 512 }},
		{"block size", block.Invalid, "use 512 or 4096", func(n *meta.NewVolume) { n.BlockSize = 1024 }},
		{"2 replicas", block.Invalid, "use 1, 3 or 5", func(n *meta.NewVolume) { n.Replicas = 2 }},
		{"7 replicas", block.Invalid, "use 1, 3 or 5", func(n *meta.NewVolume) { n.Replicas = 7 }},
		{"more replicas than nodes", block.Invalid, "3 replicas need 3 nodes with a working disk, the cluster has 2", func(n *meta.NewVolume) { n.Replicas = 3 }},
		{"duplicate", block.Exists, `"taken" already`, func(n *meta.NewVolume) { n.Name = "taken" }},
		{"bad name", block.Invalid, "upper case", func(n *meta.NewVolume) { n.Name = "Demo" }},
	}
	for _, c := range cases {
		n := base
		c.edit(&n)
		_, err := meta.CreateVolume(ctx, f.s, n)
		if err == nil || !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.why, err)
		}
	}
	all, err := meta.ListVolumes(ctx, f.s)
	f.ok(err)
	if len(all) != 1 {
		t.Fatalf("%d volumes", len(all))
	}
	v, err := meta.CreateVolume(ctx, f.s, base)
	f.ok(err)
	if v.Replicas != 1 || v.BlockSize != 512 || v.State != meta.Creating || v.Settings == 0 || v.Generation == 0 {
		t.Fatalf("defaults: %+v", v)
	}
	again, err := meta.CreateVolume(ctx, f.s, base)
	f.ok(err)
	if again.ID != v.ID {
		t.Fatal("a repeated call did not find its volume")
	}
}

func TestNames(t *testing.T) {
	good := []string{"a", "0", "demo", "vm-12.disk0", "a--b", strings.Repeat("x", 63)}
	bad := []string{"", "-a", "a-", ".a", "a.", "a..b", "a.-b", "a-.b", "Ab", "a_b", "a b", "a/b", "ä", "a\x00", strings.Repeat("x", 64)}
	for _, n := range good {
		if err := meta.CheckVolumeName(n); err != nil {
			t.Errorf("%q: %v", n, err)
		}
	}
	for _, n := range bad {
		if err := meta.CheckVolumeName(n); !errors.Is(err, block.Invalid) {
			t.Errorf("%q: %v", n, err)
		}
	}
}

func TestTwoLiveNodesOfOneID(t *testing.T) {
	f := newFixture(t, 0)
	first := f.registration(1, 10)
	lease := f.lease(meta.NodeTTL)
	_, err := meta.RegisterNode(ctx, f.s, first, lease)
	f.ok(err)
	_, err = meta.RegisterNode(ctx, f.s, first, lease)
	f.ok(err)

	other := f.registration(1, 11)
	other.Boot = "boot-b"
	_, err = meta.RegisterNode(ctx, f.s, other, f.lease(meta.NodeTTL))
	f.want(err, block.Busy, "node 1 is running already, at n1:7410")
	other.Boot = first.Boot
	other.Node.Disks = []meta.DiskMeta{{ID: block.DiskID{99}, CapacityBytes: 1}}
	_, err = meta.RegisterNode(ctx, f.s, other, f.lease(meta.NodeTTL))
	f.want(err, block.Busy, "running already")

	// The same machine with the same disks: their locks prove that it is dead.
	restarted := f.registration(1, 12)
	_, err = meta.RegisterNode(ctx, f.s, restarted, f.lease(time.Hour))
	f.ok(err)
	live, err := meta.ListLive(ctx, f.s)
	f.ok(err)
	if live[1].Incarnation != 12 {
		t.Fatalf("%+v", live)
	}
	f.world.RunFor(2 * meta.NodeTTL)
	live, err = meta.ListLive(ctx, f.s)
	f.ok(err)
	if len(live) != 1 {
		t.Fatal("the first process's lease took the second's key")
	}
	_, err = meta.RegisterNode(ctx, f.s, meta.Registration{Node: meta.NodeMeta{ID: 0}}, 0)
	f.want(err, block.Invalid, "node id 0")
	nameless := f.registration(1, 1)
	nameless.Node.Disks[0].ID = block.DiskID{}
	_, err = meta.RegisterNode(ctx, f.s, nameless, f.lease(time.Hour))
	f.want(err, block.Invalid, "without an id")
}

func TestAFailedDiskStaysFailed(t *testing.T) {
	f := newFixture(t, 1)
	f.want(meta.SetDiskFailed(ctx, f.s, 9, block.DiskID{1}), block.NotFound, "never registered")
	f.want(meta.SetDiskFailed(ctx, f.s, 1, block.DiskID{9}), block.NotFound, "no disk")
	f.ok(meta.SetDiskFailed(ctx, f.s, 1, block.DiskID{1}))
	f.ok(meta.SetDiskFailed(ctx, f.s, 1, block.DiskID{1}))
	r := f.registration(1, 1)
	n, err := meta.RegisterNode(ctx, f.s, r, f.lease(time.Hour))
	f.ok(err)
	if !n.Disks[0].Failed || n.Usable() {
		t.Fatalf("a restart cleared the flag: %+v", n)
	}
	r.Node.Disks = []meta.DiskMeta{{ID: block.DiskID{2}, CapacityBytes: 5}}
	n, err = meta.RegisterNode(ctx, f.s, r, f.lease(time.Hour))
	f.ok(err)
	if len(n.Disks) != 2 || !n.Disks[1].Absent || !n.Disks[1].Failed || !n.Usable() {
		t.Fatalf("after a swap: %+v", n)
	}
}

func TestGroupIDsAreNeverReused(t *testing.T) {
	f := newFixture(t, 1)
	g, _, err := meta.Campaign(ctx, f.s, 1, 7, f.lease(time.Hour))
	f.ok(err)
	place := [][]meta.Place{{{Node: 1, Disk: block.DiskID{1}}}}
	made, err := meta.CreateGroups(ctx, f.s, g, append(place, place...))
	f.ok(err)
	if made[0].ID != 1 || made[1].ID != 2 || made[0].Replicas[0].Replica != 1 || made[0].Created() {
		t.Fatalf("%+v", made)
	}
	// The store forgot; a node has group 40.
	r := f.registration(1, 1)
	r.HighestGroup = 40
	_, err = meta.RegisterNode(ctx, f.s, r, f.lease(time.Hour))
	f.ok(err)
	made, err = meta.CreateGroups(ctx, f.s, g, place)
	f.ok(err)
	if made[0].ID != 41 {
		t.Fatalf("group %d was handed out again", made[0].ID)
	}

	f.ok(meta.AckReplicaCreated(ctx, f.s, 41, 1, block.DiskID{1}))
	f.ok(meta.AckReplicaCreated(ctx, f.s, 41, 1, block.DiskID{1}))
	f.want(meta.AckReplicaCreated(ctx, f.s, 41, 1, block.DiskID{2}), block.NotFound, "no replica 1 on disk")
	f.want(meta.AckReplicaCreated(ctx, f.s, 99, 1, block.DiskID{1}), block.NotFound, "no group 99")
	f.ok(meta.MarkReplicaLost(ctx, f.s, 41, 1, block.DiskID{1}))
	f.want(meta.AckReplicaCreated(ctx, f.s, 41, 1, block.DiskID{1}), block.Invalid, "was lost")
	gm, err := meta.GetGroup(ctx, f.s, 41)
	f.ok(err)
	if !gm.Created() || !gm.Replicas[0].Lost {
		t.Fatalf("%+v", gm)
	}
}

func TestRenameVolume(t *testing.T) {
	f := newFixture(t, 1)
	v := f.create("old")
	f.create("taken")
	_, err := meta.RenameVolume(ctx, f.s, "old", "taken")
	f.want(err, block.Exists, "taken")
	_, err = meta.RenameVolume(ctx, f.s, "none", "new")
	f.want(err, block.NotFound, "none")
	_, err = meta.RenameVolume(ctx, f.s, "old", "B A D")
	f.want(err, block.Invalid, "B A D")
	got, err := meta.RenameVolume(ctx, f.s, "old", "new")
	f.ok(err)
	if got.ID != v.ID || got.Name != "new" {
		t.Fatalf("%+v", got)
	}
	_, err = meta.FindVolume(ctx, f.s, "old")
	f.want(err, block.NotFound, "old")
	f.create("old")
}

func owner(gateway string, nonce block.Nonce) meta.OwnerMeta {
	return meta.OwnerMeta{Gateway: gateway, Nonce: nonce, Addr: gateway + ":10809", Boot: "boot-" + gateway, Folder: "folder-" + gateway}
}

func TestOwnership(t *testing.T) {
	f := newFixture(t, 1)
	creating := f.create("creating")
	_, err := meta.AcquireOwner(ctx, f.s, creating.ID, owner("g1", 1), f.lease(time.Hour))
	f.want(err, block.Unavailable, "still being created")

	v := f.ready("demo")
	short := f.lease(meta.OwnerTTL)
	a, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", 1), short)
	f.ok(err)
	if a.Volume.Epoch != 1 || a.Owner.Epoch != 1 || a.Wait {
		t.Fatalf("%+v", a)
	}
	again, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", 1), short)
	f.ok(err)
	if again.Owner.Epoch != 1 {
		t.Fatal("a repeated call took a second epoch")
	}
	_, err = meta.AcquireOwner(ctx, f.s, v.ID, owner("g2", 2), f.lease(time.Hour))
	f.want(err, block.Busy, `attached to gateway "g1" at g1:10809`)
	_, err = meta.DeleteVolume(ctx, f.s, "demo")
	f.want(err, block.Busy, "g1")
	_, err = meta.UpdateVolume(ctx, f.s, v.ID, 0, func(v *meta.VolumeMeta) error { v.ReadOnly = true; return nil })
	f.want(err, block.Busy, "g1")

	// A restart of the same gateway, proved by boot id and folder.
	b, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", 3), short)
	f.ok(err)
	if b.Owner.Epoch != 2 || b.Wait {
		t.Fatalf("%+v", b)
	}
	_, err = meta.UpdateVolume(ctx, f.s, v.ID, 1, func(*meta.VolumeMeta) error { return nil })
	f.want(err, block.Fenced, "taken")
	unproved := owner("g1", 4)
	unproved.Folder = ""
	_, err = meta.AcquireOwner(ctx, f.s, v.ID, unproved, f.lease(time.Hour))
	f.want(err, block.Busy, "g1")

	set, err := meta.UpdateVolume(ctx, f.s, v.ID, 3, func(v *meta.VolumeMeta) error { v.ReadOnly = true; return nil })
	f.ok(err)
	if set.Settings != v.Settings+1 || set.Epoch != 2 {
		t.Fatalf("%+v", set)
	}

	// The lease ends: the volume is free for others.
	f.world.RunFor(meta.OwnerTTL + time.Second)
	c, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g2", 5), f.lease(time.Hour))
	f.ok(err)
	if c.Owner.Epoch != 3 {
		t.Fatalf("%+v", c)
	}
	f.ok(meta.ReleaseOwner(ctx, f.s, v.ID, 3)) // an old owner's release does nothing
	owners, err := meta.ListOwners(ctx, f.s)
	f.ok(err)
	if owners[v.ID].Gateway != "g2" {
		t.Fatalf("%+v", owners)
	}
	f.want(meta.ReattachOwner(ctx, f.s, v.ID, b.Owner, f.lease(time.Hour)), block.Fenced, "")
	f.ok(meta.ReleaseOwner(ctx, f.s, v.ID, 5))
	f.ok(meta.ReleaseOwner(ctx, f.s, v.ID, 5))
	f.want(meta.ReattachOwner(ctx, f.s, v.ID, b.Owner, f.lease(time.Hour)), block.Fenced, "elsewhere")
	f.ok(meta.ReattachOwner(ctx, f.s, v.ID, c.Owner, f.lease(time.Hour)))
}

func TestForcedRemovalMakesTheNextOwnerWait(t *testing.T) {
	f := newFixture(t, 1)
	v := f.ready("demo")
	_, err := meta.ForceOwner(ctx, f.s, v.ID)
	f.want(err, block.NotFound, "not attached")
	a, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", 1), f.lease(time.Hour))
	f.ok(err)
	removed, err := meta.ForceOwner(ctx, f.s, v.ID)
	f.ok(err)
	if removed.Nonce != 1 {
		t.Fatalf("%+v", removed)
	}
	f.want(meta.ReattachOwner(ctx, f.s, v.ID, a.Owner, f.lease(time.Hour)), block.Fenced, "")
	b, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g2", 2), f.lease(time.Hour))
	f.ok(err)
	if !b.Wait || b.Owner.Epoch <= a.Owner.Epoch {
		t.Fatalf("%+v", b)
	}
	f.want(meta.MarkExported(ctx, f.s, v.ID, 1), block.Fenced, "")
	f.ok(meta.MarkExported(ctx, f.s, v.ID, 2))
	f.ok(meta.ReleaseOwner(ctx, f.s, v.ID, 2))
	c, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g3", 3), f.lease(time.Hour))
	f.ok(err)
	if c.Wait {
		t.Fatal("the wait outlived the export")
	}
}

// TestARestoredStoreHandsOutNoOldEpoch: a backup forgets an epoch that the groups
// have seen; their refusal raises it again.
func TestARestoredStoreHandsOutNoOldEpoch(t *testing.T) {
	f := newFixture(t, 1)
	v := f.ready("demo")
	backup := f.mem.Backup()
	for nonce := range block.Nonce(5) {
		_, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", nonce+1), f.lease(time.Hour))
		f.ok(err)
	}
	f.mem.Restore(backup)
	a, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g2", 77), f.lease(time.Hour))
	f.ok(err)
	if a.Owner.Epoch != 1 {
		t.Fatalf("the test tests nothing: %+v", a)
	}
	_, err = meta.RaiseEpoch(ctx, f.s, v.ID, 5, 5)
	f.want(err, block.Fenced, "g2")
	for range 2 { // the second finds what the first did
		b, err := meta.RaiseEpoch(ctx, f.s, v.ID, 77, 5)
		f.ok(err)
		if b.Owner.Epoch != 6 || b.Volume.Epoch != 6 || !b.Wait {
			t.Fatalf("%+v", b)
		}
	}
	kv, err := f.s.Get(ctx, meta.OwnerKey(v.ID))
	f.ok(err)
	if kv.Lease == 0 {
		t.Fatal("the owner key lost its lease")
	}
}

// TestAnAttachmentComesBackAfterALostRaise: RaiseEpoch happened and its answer
// was lost, then the lease too.
func TestAnAttachmentComesBackAfterALostRaise(t *testing.T) {
	f := newFixture(t, 1)
	v := f.ready("demo")
	first := f.lease(time.Hour)
	a, err := meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", 1), first)
	f.ok(err)
	_, err = meta.RaiseEpoch(ctx, f.s, v.ID, 1, 5)
	f.ok(err)
	f.ok(meta.ReattachOwner(ctx, f.s, v.ID, a.Owner, first))
	f.ok(f.s.Revoke(ctx, first))
	f.want(meta.ReattachOwner(ctx, f.s, v.ID, a.Owner, first), block.Unavailable, "lease")
	f.ok(meta.ReattachOwner(ctx, f.s, v.ID, a.Owner, f.lease(time.Hour)))
	b, err := meta.RaiseEpoch(ctx, f.s, v.ID, 1, a.Owner.Epoch)
	f.ok(err)
	if b.Owner.Epoch != 6 || b.Volume.Epoch != 6 {
		t.Fatalf("%+v", b)
	}
	f.ok(meta.ReleaseOwner(ctx, f.s, v.ID, 1))
	_, err = meta.AcquireOwner(ctx, f.s, v.ID, owner("g2", 2), f.lease(time.Hour))
	f.ok(err)
	f.ok(meta.ReleaseOwner(ctx, f.s, v.ID, 2))
	f.want(meta.ReattachOwner(ctx, f.s, v.ID, b.Owner, f.lease(time.Hour)), block.Fenced, "elsewhere")
}

func TestDeleteVolume(t *testing.T) {
	f := newFixture(t, 1)
	v := f.ready("demo")
	_, err := meta.DeleteVolumeAs(ctx, f.s, "demo", block.VolumeID{9})
	f.want(err, block.NotFound, "another volume")
	d, err := meta.DeleteVolumeAs(ctx, f.s, "demo", v.ID)
	f.ok(err)
	if d.State != meta.Deleting || d.Epoch != v.Epoch+1 {
		t.Fatalf("%+v", d)
	}
	_, err = meta.DeleteVolume(ctx, f.s, "demo")
	f.want(err, block.NotFound, "demo")
	_, err = meta.AcquireOwner(ctx, f.s, v.ID, owner("g1", 1), f.lease(time.Hour))
	f.want(err, block.NotFound, "being deleted")
	_, err = meta.WantSize(ctx, f.s, v.ID, 1<<40)
	f.want(err, block.NotFound, "being deleted")
	if other := f.create("demo"); other.ID == v.ID {
		t.Fatal("the name is not free")
	}
}

func TestSizesNeedTheirSpans(t *testing.T) {
	f := newFixture(t, 1)
	v := f.ready("demo")
	_, err := meta.UpdateVolume(ctx, f.s, v.ID, 0, func(v *meta.VolumeMeta) error { v.SizeBytes = 2 << 40; return nil })
	f.want(err, block.Internal, "WantBytes")
	_, err = meta.UpdateVolume(ctx, f.s, v.ID, 0, func(v *meta.VolumeMeta) error { v.SizeBytes = 1000; return nil })
	f.want(err, block.Invalid, "multiple")
	_, err = meta.UpdateVolume(ctx, f.s, v.ID, 0, func(v *meta.VolumeMeta) error { v.Settings--; return nil })
	f.want(err, block.Internal, "never fall")
	w, err := meta.WantSize(ctx, f.s, v.ID, 2<<40)
	f.ok(err)
	if w.WantBytes != 2<<40 || w.SizeBytes != v.SizeBytes || w.Settings != v.Settings {
		t.Fatalf("%+v", w)
	}
	_, err = meta.WantSize(ctx, f.s, v.ID, meta.MaxVolumeBytes+512)
	f.want(err, block.Invalid, "largest")
}

// TestEveryAnswerMayBeLost runs the catalog's changes with the n-th call's answer
// lost, for every n, and repeats them: the end is the same as without.
func TestEveryAnswerMayBeLost(t *testing.T) {
	changes := func(s meta.Store, v block.VolumeID, lease meta.LeaseID) error {
		again := func(f func() error) error {
			err := f()
			if err != nil && block.KindOf(err) == block.Unavailable {
				err = f()
			}
			return err
		}
		steps := []func() error{
			func() error {
				_, err := meta.CreateVolume(ctx, s, meta.NewVolume{ID: block.VolumeID{0xee}, Name: "new", SizeBytes: 4096})
				return err
			},
			func() error { _, err := meta.AcquireOwner(ctx, s, v, owner("g", 9), lease); return err },
			func() error {
				_, err := meta.UpdateVolume(ctx, s, v, 9, func(v *meta.VolumeMeta) error { v.ReadOnly = true; return nil })
				return err
			},
			func() error { _, err := meta.RaiseEpoch(ctx, s, v, 9, 20); return err },
			func() error { return meta.MarkExported(ctx, s, v, 9) },
			func() error { return meta.ReleaseOwner(ctx, s, v, 9) },
			func() error { _, err := meta.WantSize(ctx, s, v, 2<<40); return err },
		}
		for _, step := range steps {
			if err := again(step); err != nil {
				return err
			}
		}
		return nil
	}
	var want string
	for n := 0; ; n++ {
		f := newFixture(t, 1)
		v := f.ready("demo")
		lease := f.lease(time.Hour)
		calls := 0
		f.s.Inject(func(meta.Call) meta.Fault {
			if calls++; calls == n {
				return meta.LoseAnswer
			}
			return meta.NoFault
		})
		f.ok(changes(f.s, v.ID, lease))
		last := calls
		f.s.Inject(nil)
		kvs, _, err := f.s.List(ctx, meta.VolumesPrefix)
		f.ok(err)
		var got string
		for _, kv := range kvs {
			got += fmt.Sprintf("%s %s\n", kv.Key, kv.Value)
		}
		if n == 0 {
			want = got
		} else if got != want {
			t.Fatalf("with the answer to call %d lost:\n%s\nwithout:\n%s", n, got, want)
		}
		if n > last {
			return
		}
	}
}

// The last majority of a group is not put into quarantine, and a member whose
// disk failed or is not there is none of it.
func TestDamagedCountsDisksThatAreOut(t *testing.T) {
	for _, c := range []struct {
		name string
		out  func(f *fixture)
	}{
		{"failed", func(f *fixture) { f.ok(meta.SetDiskFailed(ctx, f.s, 2, block.DiskID{2})) }},
		{"absent", func(f *fixture) {
			r := f.registration(2, 2)
			r.Node.Disks[0].ID = block.DiskID{9}
			_, err := meta.RegisterNode(ctx, f.s, r, f.lease(time.Hour))
			f.ok(err)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, 3)
			g, _, err := meta.Campaign(ctx, f.s, 1, 7, f.lease(time.Hour))
			f.ok(err)
			made, err := meta.CreateGroups(ctx, f.s, g, [][]meta.Place{{{Node: 1, Disk: block.DiskID{1}}, {Node: 2, Disk: block.DiskID{2}}, {Node: 3, Disk: block.DiskID{3}}}})
			f.ok(err)
			first := made[0].Replicas[0]
			c.out(f)
			f.want(meta.MarkReplicaDamaged(ctx, f.s, made[0].ID, first.Replica, first.Disk), block.Busy, "no majority")
			second := made[0].Replicas[1]
			f.ok(meta.MarkReplicaDamaged(ctx, f.s, made[0].ID, second.Replica, second.Disk))
		})
	}
}
