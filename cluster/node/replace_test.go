package node_test

import (
	"bytes"
	"os"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/internal/block"
)

// TestWipedDiskIsRefilled: the replicas of a disk that was swapped for an empty
// one are made anew on it, under new ids, with all the data; the group is whole
// again, and does without another member then.
func TestWipedDiskIsRefilled(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	v := l.volume("demo", 16<<20)
	c := newClient(l)
	a := c.attach(v, 1)
	a.write(0, 0, pattern(1, 4))
	a.write(1, 0, pattern(2, 4))

	l.absentAfter = 50 * time.Millisecond
	for _, m := range l.nodes { // also to give every candidate the short wait
		m.stop()
		if m.id == 2 {
			if err := os.RemoveAll(m.dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(m.dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		m.start()
	}
	admin := l.meta.Client()
	l.eventually("all groups are whole", func() bool {
		groups, err := meta.ListGroups(l.ctx, admin)
		if err != nil {
			return false
		}
		for _, g := range groups {
			if g.Joining() || len(g.Replicas) != 3 || g.LastReplica != 4 || g.ConfVersion == 0 || !g.Created() {
				return false
			}
		}
		return true
	})
	s, _ := node.Snapshot(l.nodes[1].loop, l.nodes[1].node)
	for _, r := range s.Replicas {
		if r.Replica != 4 || r.Disk != s.Disks[0].ID {
			t.Errorf("%+v", r)
		}
	}
	l.nodes[2].stop() // the new replicas must count now
	a.write(0, 4, pattern(3, 4))
	for _, from := range []block.NodeID{1, 2} {
		if got := a.read(from, 0, 0, 8); !bytes.Equal(got, append(pattern(1, 4), pattern(3, 4)...)) {
			t.Errorf("node %d has other data", from)
		}
		if got := a.read(from, 1, 0, 4); !bytes.Equal(got, pattern(2, 4)) {
			t.Errorf("node %d has other data in chunk 1", from)
		}
	}
	l.nodes[2].start()
}
