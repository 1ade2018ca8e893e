package node_test

import (
	"bytes"
	"testing"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/internal/block"
)

// status is that of a machine's node.
func (m *machine) status() node.Status {
	s, _ := node.Snapshot(m.loop, m.node)
	return s
}

// TestQuarantinedReplicasAreReplacedAndRemoved: on the same node and disk, under
// new ids; what the old ones held goes, from the index and from the log, and
// stays away after a restart.
func TestQuarantinedReplicasAreReplacedAndRemoved(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	v := l.volume("demo", 16<<20)
	a := newClient(l).attach(v, 1)
	for i := range 16 {
		a.write(block.Chunk(i%4), block.Index(16*i), pattern(i, 16))
	}
	admin := l.meta.Client()
	groups, err := meta.ListGroups(l.ctx, admin)
	if err != nil {
		t.Fatal(err)
	}
	m := l.nodes[1]
	disk := m.status().Disks[0].ID
	for _, g := range groups {
		if err := meta.MarkReplicaDamaged(l.ctx, admin, g.ID, 2, disk); err != nil {
			t.Fatal(err)
		}
		// The group needs the others more than to be rid of them.
		if err := meta.MarkReplicaDamaged(l.ctx, admin, g.ID, 1, l.nodes[0].status().Disks[0].ID); block.KindOf(err) != block.Busy {
			t.Fatalf("group %d: %v", g.ID, err)
		}
	}
	l.eventually("all groups are whole, and nothing is left to remove", func() bool {
		groups, err := meta.ListGroups(l.ctx, admin)
		if err != nil {
			return false
		}
		for _, g := range groups {
			if !g.Whole() || len(g.Removed) > 0 || g.LastReplica != 4 {
				return false
			}
		}
		return true
	})
	check := func() {
		t.Helper()
		for _, r := range m.status().Replicas {
			if r.Replica != 4 || r.Disk != disk {
				t.Errorf("%+v", r)
			}
		}
		l.eventually("its disk holds what another one does, and the logs are truncated", func() bool {
			s, other := m.status(), l.nodes[0].status()
			d, o := s.Disks[0], other.Disks[0]
			return s.Retired == 0 && d.LiveBytes == o.LiveBytes && d.LiveBytes == 16*16*block.Size && d.LogBytes < 64<<10 && o.LogBytes < 64<<10
		})
		for i := range 16 {
			if got := a.read(2, block.Chunk(i%4), block.Index(16*i), 16); !bytes.Equal(got, pattern(i, 16)) {
				t.Errorf("write %d is not there", i)
			}
		}
	}
	if n := m.status().Counters.Removed; n != uint64(len(groups)) {
		t.Errorf("%d replicas were removed, %d were replaced", n, len(groups))
	}
	check()
	m.stop()
	m.start()
	check()
}
