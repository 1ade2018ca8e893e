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

// TestANodeThatIsAwayForLongIsReplaced: after the time that the operator set, on
// the nodes that are left; a node that comes back before that keeps its replicas.
func TestANodeThatIsAwayForLongIsReplaced(t *testing.T) {
	c := newCluster(t, 3, 5)
	for _, n := range c.nodes {
		n.replaceAfter = 2 * time.Minute
		n.restart()
	}
	c.until("a coordinator", 20*time.Second, func() bool { return c.leader() != nil })
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
	n := c.nodes[4]
	n.kill()
	c.world.RunFor(100 * time.Second)
	n.start()
	c.world.RunFor(100 * time.Second)
	for _, g := range c.groups() {
		if g.LastReplica != 0 || g.Joining() {
			t.Fatalf("a replica of a node that was away for 100 s is replaced: %+v", g)
		}
	}
	if c.whole(3, n.disks[0].ID) {
		t.Fatal("the node holds nothing: the test proves nothing")
	}
	n.kill()
	c.until("its replicas are elsewhere", 3*time.Minute, func() bool { return c.whole(3, n.disks[0].ID) })
	c.check()
}

// TestAReplicaThatIsGoneBeforeItJoinsIsGivenUp: its disk failed, or its node is
// away, or what it was to replace is back. The next order goes elsewhere.
func TestAReplicaThatIsGoneBeforeItJoinsIsGivenUp(t *testing.T) {
	for _, x := range []struct {
		name string
		lose func(c *cluster, g meta.GroupMeta, joining *node)
	}{
		{"disk failed", func(c *cluster, _ meta.GroupMeta, n *node) {
			c.must(meta.SetDiskFailed(background, c.admin, n.id, n.disks[0].ID))
		}},
		{"node away", func(_ *cluster, _ meta.GroupMeta, n *node) { n.kill() }},
		{"damaged", func(c *cluster, g meta.GroupMeta, n *node) {
			for _, r := range g.Replicas {
				if r.Joining {
					c.must(meta.MarkReplicaDamaged(background, c.admin, g.ID, r.Replica, r.Disk))
				}
			}
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := newCluster(t, 5, 6)
			id := c.create(10*gib, 3)
			c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
			for _, n := range c.nodes {
				n.slow = true
			}
			old := c.groups()[0].Replicas[0]
			c.must(meta.SetDiskFailed(background, c.admin, old.Node, old.Disk))
			joining := func() (meta.GroupMeta, meta.ReplicaMeta) {
				for _, g := range c.groups() {
					for _, r := range g.Replicas {
						if r.Joining && r.Created {
							return g, r
						}
					}
				}
				return meta.GroupMeta{}, meta.ReplicaMeta{}
			}
			c.until("a replica joins", 10*time.Second, func() bool { _, r := joining(); return r.Replica != 0 })
			g, r := joining()
			x.lose(c, g, c.nodes[r.Node-1])
			now := func() meta.GroupMeta {
				gm, err := meta.GetGroup(background, c.admin, g.ID)
				c.must(err)
				return gm
			}
			c.until("it is given up", 2*time.Minute, func() bool {
				for _, m := range now().Replicas {
					if m.Replica == r.Replica {
						return m.GivenUp
					}
				}
				return true
			})
			for _, n := range c.nodes {
				n.slow = false
			}
			for _, n := range c.nodes {
				if !n.loop.Dead() {
					n.restart()
				}
			}
			c.until("the group is whole without it", time.Minute, func() bool {
				gm := now()
				return gm.Whole() && len(gm.Replicas) == 3 && gm.LastReplica > r.Replica
			})
			c.check()
		})
	}
}

// TestFewerZonesThanReplicas: groups are placed all the same, over the zones that
// there are, and so are the replicas that take the place of others.
func TestFewerZonesThanReplicas(t *testing.T) {
	c := newCluster(t, 8, 6)
	zoneOf := map[block.NodeID]string{}
	for i, n := range c.nodes {
		n.zone = []string{"a", "b"}[i%2]
		zoneOf[n.id] = n.zone
		n.restart()
	}
	c.until("the zones are known", 20*time.Second, func() bool {
		nodes, err := meta.ListNodes(background, c.admin)
		c.must(err)
		for _, n := range nodes {
			if n.Zone != zoneOf[n.ID] {
				return false
			}
		}
		return c.live() == len(c.nodes) && c.leader() != nil
	})
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
	spread := func() {
		t.Helper()
		for _, g := range c.groups() {
			in := map[string]int{}
			for _, r := range g.Replicas {
				in[zoneOf[r.Node]]++
			}
			if len(in) != 2 {
				t.Errorf("group %d is in the zones %v", g.ID, in)
			}
		}
	}
	spread()
	r := c.groups()[0].Replicas[0]
	c.must(meta.SetDiskFailed(background, c.admin, r.Node, r.Disk))
	c.until("the groups are whole", time.Minute, func() bool { return c.whole(3, r.Disk) })
	spread()
	c.check()
}

// TestAGroupWithoutAMajorityIsNotRepaired: nobody could take a new replica in,
// and whoever knows more than is left must decide.
func TestAGroupWithoutAMajorityIsNotRepaired(t *testing.T) {
	c := newCluster(t, 6, 6)
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 5*time.Second, func() bool { return c.state(id) == meta.Ready })
	g := c.groups()[0]
	for _, r := range g.Replicas[:2] {
		c.must(meta.MarkReplicaLost(background, c.admin, g.ID, r.Replica, r.Disk))
	}
	c.world.RunFor(10 * time.Second)
	now, err := meta.GetGroup(background, c.admin, g.ID)
	c.must(err)
	if well, _ := now.Well(); well == 1 && (now.Joining() || now.LastReplica != 0) {
		t.Errorf("%+v", now)
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
