package coordinator_test

import (
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

// groups are all groups of the catalog.
func (c *cluster) groups() []meta.GroupMeta {
	c.t.Helper()
	gs, err := meta.ListGroups(background, c.admin)
	c.must(err)
	return gs
}

// whole tells whether every group has so many members, none of them on disk.
func (c *cluster) whole(replicas int, disk block.DiskID) bool {
	for _, g := range c.groups() {
		if g.Joining() || len(g.Replicas) != replicas || !g.Created() {
			return false
		}
		for _, r := range g.Replicas {
			if r.Disk == disk || r.Lost {
				return false
			}
		}
	}
	return true
}

// TestReplicasOfAFailedDiskMove: under new ids, to other nodes, whatever
// coordinator carries it out: they crash all the while.
func TestReplicasOfAFailedDiskMove(t *testing.T) {
	for seed := uint64(1); seed <= 6; seed++ {
		c := newCluster(t, seed, 5)
		id := c.create(10*gib, 3)
		c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
		before := map[block.GroupID]block.ReplicaID{}
		disk := c.groups()[0].Replicas[0].Disk
		for _, g := range c.groups() {
			for _, r := range g.Replicas {
				before[g.ID] = max(before[g.ID], r.Replica)
			}
		}
		c.must(meta.SetDiskFailed(background, c.admin, c.groups()[0].Replicas[0].Node, disk))
		r := c.world.Rand()
		for range 400 {
			if c.whole(3, disk) {
				break
			}
			c.world.RunFor(time.Duration(r.IntN(400)) * time.Millisecond)
			if n := c.leader(); n != nil && r.IntN(12) == 0 {
				n.restart()
			}
			c.check()
		}
		c.until("the groups are whole", 30*time.Second, func() bool { return c.whole(3, disk) })
		moved := 0
		for _, g := range c.groups() {
			for _, r := range g.Replicas {
				if r.Replica > before[g.ID] {
					moved++
				}
			}
		}
		if moved == 0 {
			t.Errorf("seed %d: nothing moved", seed)
		}
		c.check()
	}
}

// TestANodeThatIsDownIsNotReplaced: it is expected back.
func TestANodeThatIsDownIsNotReplaced(t *testing.T) {
	c := newCluster(t, 3, 5)
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
	c.nodes[4].kill()
	c.world.RunFor(3 * time.Minute)
	for _, g := range c.groups() {
		if g.LastReplica != 0 || g.Joining() {
			t.Fatalf("%+v", g)
		}
	}
}

// TestADeposedCoordinatorReplacesNothing: the guard of an earlier election does
// not order a replica, and an order decided on other members is void.
func TestADeposedCoordinatorReplacesNothing(t *testing.T) {
	c := newCluster(t, 4, 5)
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
	g := c.groups()[0]
	for _, n := range c.nodes {
		n.kill()
	}
	c.world.RunFor(2 * meta.NodeTTL)
	campaign := func(node block.NodeID) meta.Guard {
		lease, err := c.admin.Grant(background, time.Hour)
		c.must(err)
		guard, won, err := meta.Campaign(background, c.admin, node, uint64(node), lease)
		if err != nil || !won {
			t.Fatal(won, err)
		}
		return guard
	}
	old := campaign(1)
	_, err := c.admin.Txn(background, meta.Txn{Then: []meta.Op{meta.Delete(meta.ElectionKey)}})
	c.must(err)
	now := campaign(2)
	at := meta.Place{Node: 5, Disk: c.nodes[4].disks[0].ID}
	if err := meta.ReplaceReplica(background, c.admin, old, g.ID, g.ConfVersion, 1, at); block.KindOf(err) != block.Fenced {
		t.Errorf("the old one: %v", err)
	}
	c.must(meta.ReplaceReplica(background, c.admin, now, g.ID, g.ConfVersion+1, 1, at))
	if c.groups()[0].Joining() {
		t.Error("an order on other members was written")
	}
	c.must(meta.ReplaceReplica(background, c.admin, now, g.ID, g.ConfVersion, 1, at))
	if !c.groups()[0].Joining() {
		t.Error("the new one's order was not written")
	}
}
