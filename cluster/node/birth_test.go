package node_test

import (
	"os"
	"path/filepath"
	"testing"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/internal/block"
)

// TestLostIndex: the log knows a replica whose index is gone. Before the store
// was told of the replica it is made again, unless it has been open; after that
// it is lost (C1). Nothing of it ends the process.
func TestLostIndex(t *testing.T) {
	for _, tc := range []struct {
		name string
		// order is what the store says of the replica.
		created, open, lost bool
	}{
		{name: "not acknowledged"},
		{name: "open but not acknowledged", open: true, lost: true},
		{name: "acknowledged", created: true, lost: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, 1)
			m := l.nodes[0]
			admin := l.meta.Client()
			s, _ := node.Snapshot(m.loop, m.node)
			// Acknowledgements do not arrive when Created is already set, and a
			// replica among three never wins an election: it stays as it was born.
			g := meta.GroupMeta{ID: 77, Replicas: []meta.ReplicaMeta{{Node: 1, Disk: s.Disks[0].ID, Replica: 1}}}
			if !tc.open {
				g.Replicas = append(g.Replicas, meta.ReplicaMeta{Node: 8, Disk: block.NewUUID(), Replica: 2}, meta.ReplicaMeta{Node: 9, Disk: block.NewUUID(), Replica: 3})
			}
			put := func() {
				t.Helper()
				if _, err := admin.Txn(l.ctx, meta.Txn{Then: []meta.Op{meta.Put(meta.GroupKey(g.ID), meta.EncodeGroup(g), 0)}}); err != nil {
					t.Fatal(err)
				}
			}
			now := func() meta.ReplicaMeta {
				t.Helper()
				kv, err := admin.Get(l.ctx, meta.GroupKey(g.ID))
				if err != nil {
					t.Fatal(err)
				}
				v, err := meta.DecodeGroup(kv)
				if err != nil {
					t.Fatal(err)
				}
				return v.Replicas[0]
			}
			put()
			l.eventually("the replica is made", func() bool { return now().Created })
			if tc.open {
				l.eventually("the replica leads", func() bool {
					s, _ := node.Snapshot(m.loop, m.node)
					return len(s.Replicas) == 1 && s.Replicas[0].Leading
				})
			}
			m.stop()
			if err := os.RemoveAll(filepath.Join(m.dir, "index")); err != nil {
				t.Fatal(err)
			}
			g.Replicas[0].Created = tc.created
			put()
			m.start()
			l.eventually("the order is answered", func() bool { r := now(); return r.Lost || r.Created != tc.created })
			if r := now(); r.Lost != tc.lost {
				t.Errorf("%+v", r)
			}
		})
	}
}
