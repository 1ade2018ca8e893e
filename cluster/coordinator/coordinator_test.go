package coordinator_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

const gib = 1 << 30

func TestAVolumeGetsItsGroups(t *testing.T) {
	for _, nodes := range []int{1, 3, 5} {
		t.Run(fmt.Sprint(nodes, " nodes"), func(t *testing.T) {
			c := newCluster(t, 1, nodes)
			id := c.create(10*gib, 0)
			c.until("the volume is ready", 3*time.Second, func() bool { return c.state(id) == meta.Ready })
			v := c.volume(id)
			if len(v.Spans) != 1 || len(v.Spans[0]) != max(2*nodes, 4) || v.Layout != 1 || v.Waiting != "" {
				t.Fatalf("%+v", v)
			}
			c.check()
			groups, err := meta.ListGroups(background, c.admin)
			c.must(err)
			if len(groups) != len(v.Spans[0]) {
				t.Fatalf("%d groups were made for a volume of %d", len(groups), len(v.Spans[0]))
			}
		})
	}
}

func TestManyVolumesShareTheGroups(t *testing.T) {
	c := newCluster(t, 2, 3)
	var ids []block.VolumeID
	for range 40 {
		ids = append(ids, c.create(100*gib, 3))
	}
	c.until("all are ready", 20*time.Second, func() bool {
		for _, id := range ids {
			if c.state(id) != meta.Ready {
				return false
			}
		}
		return true
	})
	c.check()
	load := map[block.GroupID]int{}
	for _, id := range ids {
		for _, g := range c.volume(id).Groups() {
			load[g]++
		}
	}
	groups, err := meta.ListGroups(background, c.admin)
	c.must(err)
	// 40 x 100 GiB over groups that should hold at most 51 GiB.
	if len(groups) < 78 || len(groups) > 100 {
		t.Fatalf("%d groups", len(groups))
	}
	for g, n := range load {
		if n > 4 {
			t.Errorf("group %d has %d volumes, the average is %d", g, n, 40*6/len(groups))
		}
	}
}

func TestGrowthAppendsSpans(t *testing.T) {
	c := newCluster(t, 3, 3)
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 3*time.Second, func() bool { return c.state(id) == meta.Ready })
	before := c.volume(id)
	_, err := meta.WantSize(background, c.admin, id, 3*block.SpanBytes-512)
	c.must(err)
	c.until("the spans are there", 5*time.Second, func() bool { return len(c.volume(id).Spans) == 3 })
	v := c.volume(id)
	if v.State != meta.Ready || v.SizeBytes != before.SizeBytes || v.Layout <= before.Layout || fmt.Sprint(v.Spans[0]) != fmt.Sprint(before.Spans[0]) {
		t.Fatalf("grown from %+v to %+v", before, v)
	}
	_, err = meta.UpdateVolume(background, c.admin, id, 0, func(v *meta.VolumeMeta) error { v.SizeBytes = v.WantBytes; return nil })
	c.must(err)
	v = c.volume(id)
	if v.WantBytes != 0 || v.Settings != before.Settings+1 {
		t.Fatalf("%+v", v)
	}
	c.check()
}

func TestDeletionTellsEveryGroup(t *testing.T) {
	c := newCluster(t, 4, 3)
	c.deleteFails = 30
	id := c.create(10*gib, 3)
	c.until("the volume is ready", 3*time.Second, func() bool { return c.state(id) == meta.Ready })
	v, err := meta.DeleteVolume(background, c.admin, "vol1")
	c.must(err)
	if _, err := meta.FindVolume(background, c.admin, "vol1"); err == nil || block.KindOf(err) != block.NotFound {
		t.Fatalf("a deleted volume's name: %v", err)
	}
	c.until("the volume is gone", 20*time.Second, func() bool { return c.gone(id) })
	c.checkDeleted(v)
}

func TestAVolumeWaitsForNodesAndSaysSo(t *testing.T) {
	c := newCluster(t, 5, 3)
	c.nodes[0].kill()
	c.until("node 1 is dead and another leads", 30*time.Second, func() bool { return c.live() == 2 && c.leader() != nil })
	id := c.create(gib, 3)
	c.until("it says what it waits for", 5*time.Second, func() bool { return strings.Contains(c.volume(id).Waiting, "3 nodes that are up, 2 are") })
	small := c.create(gib, 1)
	c.until("another volume does not wait for it", 5*time.Second, func() bool { return c.state(small) == meta.Ready })
	c.nodes[0].start()
	c.until("it is ready after the node came back", 20*time.Second, func() bool { return c.state(id) == meta.Ready })
	if w := c.volume(id).Waiting; w != "" {
		t.Fatalf("ready and waiting: %s", w)
	}
	c.check()
}

func TestADeadNodeDoesNotHoldUpOtherGroups(t *testing.T) {
	c := newCluster(t, 6, 4)
	// Groups are ordered on node 4, which dies before it has made them.
	victim := c.nodes[3]
	if c.leader() == victim {
		victim = c.nodes[2]
	}
	victim.loop.Pause()
	id := c.create(gib, 3)
	c.world.RunFor(time.Second)
	victim.kill()
	c.until("it is ready without that node", 20*time.Second, func() bool { return c.state(id) == meta.Ready })
	c.check()
	groups, err := meta.ListGroups(background, c.admin)
	c.must(err)
	for _, g := range c.volume(id).Groups() {
		for _, r := range groups[g-1].Replicas {
			if r.Node == victim.id {
				t.Errorf("group %d lives on the dead node", g)
			}
		}
	}
}

func TestStopHandsOver(t *testing.T) {
	c := newCluster(t, 7, 3)
	old := c.leader()
	stopped := false
	old.loop.Post(func() { old.coord.Stop(func() { stopped = true }) })
	c.until("another leads at once", 2*time.Second, func() bool { l := c.leader(); return stopped && l != nil && l != old })
}

// TestADeposedCoordinatorChangesNothing is the double-leader window: the old one
// still believes that it leads, has work under way and goes on with it.
func TestADeposedCoordinatorChangesNothing(t *testing.T) {
	for _, how := range []string{"paused", "cut off"} {
		for seed := range uint64(20) {
			t.Run(fmt.Sprint(how, seed), func(t *testing.T) {
				c := newCluster(t, 100+seed, 3)
				old := c.leader()
				ids := []block.VolumeID{c.create(10*gib, 3), c.create(10*gib, 1)}
				c.world.RunFor(time.Duration(c.world.Rand().IntN(8000)) * time.Microsecond)
				if how == "paused" {
					old.loop.Pause()
				} else {
					old.client.SetCut(true)
				}
				c.until("another leads", 30*time.Second, func() bool { l := c.leader(); return l != nil && l != old })
				took := old.store.took
				// More work, so that both would have something to do.
				for range 3 {
					ids = append(ids, c.create(10*gib, 3))
				}
				if how == "paused" {
					if !old.coord.Leading() {
						t.Fatal("the paused one knows already; the test tests nothing")
					}
					old.loop.Resume()
				} else {
					old.client.SetCut(false)
				}
				c.until("all are ready", 30*time.Second, func() bool {
					for _, id := range ids {
						if c.state(id) != meta.Ready {
							return false
						}
					}
					return true
				})
				c.until("the old one knows", 30*time.Second, func() bool { return !old.coord.Leading() })
				if old.store.took != took {
					t.Errorf("the deposed coordinator changed the catalog %d times", old.store.took-took)
				}
				c.check()
			})
		}
	}
}

// script is what every crash point is tried in: creation, growth and deletion.
func script(c *cluster) (done func() bool, deleted func() meta.VolumeMeta) {
	keep := c.create(10*gib, 3)
	other := c.create(10*gib, 1)
	grown, removed := false, false
	var gone meta.VolumeMeta
	return func() bool {
		if !grown && c.state(keep) == meta.Ready {
			_, err := meta.WantSize(background, c.admin, keep, 2*block.SpanBytes)
			c.must(err)
			grown = true
		}
		if !removed && c.state(other) == meta.Ready {
			var err error
			gone, err = meta.DeleteVolume(background, c.admin, "vol2")
			c.must(err)
			removed = true
		}
		return grown && removed && len(c.volume(keep).Spans) == 2 && c.gone(other)
	}, func() meta.VolumeMeta { return gone }
}

// TestACrashAtEveryStep kills the leader at its n-th call of the store, with the
// call done or not, for every n until the script ends before n calls.
func TestACrashAtEveryStep(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Refuse, meta.LoseAnswer} {
		for n := 1; ; n++ {
			c := newCluster(t, uint64(n), 3)
			leader := c.leader()
			calls, crashed := 0, false
			leader.client.Inject(func(meta.Call) meta.Fault {
				if calls++; calls != n {
					return meta.NoFault
				}
				crashed = true
				leader.kill()
				return fault
			})
			done, deleted := script(c)
			if !c.world.RunUntil(60*time.Second, func() bool {
				if crashed && leader.loop.Dead() {
					leader.start()
				}
				return done()
			}) {
				t.Fatalf("crash at call %d (fault %d): the script never ended", n, fault)
			}
			c.check()
			c.checkDeleted(deleted())
			if t.Failed() {
				t.Fatalf("crash at call %d (fault %d)", n, fault)
			}
			if !crashed {
				if n < 20 {
					t.Fatalf("the script took %d calls only", n)
				}
				break
			}
		}
	}
}

// TestFaultsEverywhere: nodes are killed, paused and cut off, the store goes
// away, calls fail before and after they were done; then all is well again.
func TestFaultsEverywhere(t *testing.T) {
	seeds := uint64(60)
	if os.Getenv("FIRN_TEST_LONG") != "" {
		seeds = 3000
	}
	for seed := range seeds {
		c := newCluster(t, 1000+seed, 3)
		c.deleteFails = 20
		r := c.world.Rand()
		faulty := true
		inject := func(n *node) {
			n.client.Inject(func(meta.Call) meta.Fault {
				if !faulty {
					return meta.NoFault
				}
				switch r.IntN(20) {
				case 0:
					return meta.Refuse
				case 1:
					return meta.LoseAnswer
				}
				return meta.NoFault
			})
		}
		for _, n := range c.nodes {
			inject(n)
		}
		done, deleted := script(c)
		for range 12 {
			c.world.RunFor(time.Duration(r.IntN(1500)) * time.Millisecond)
			done()
			n := c.nodes[r.IntN(3)]
			switch r.IntN(6) {
			case 0:
				n.restart()
				inject(n)
			case 1:
				n.client.SetCut(true)
			case 2:
				n.client.SetCut(false)
			case 3:
				n.loop.Pause()
			case 4:
				n.loop.Resume()
			case 5:
				c.mem.SetDown(true)
				c.world.RunFor(time.Duration(r.IntN(8000)) * time.Millisecond)
				c.mem.SetDown(false)
			}
			c.check()
		}
		faulty = false
		for _, n := range c.nodes {
			n.loop.Resume()
			n.client.SetCut(false)
		}
		if !c.world.RunUntil(60*time.Second, done) {
			t.Fatalf("seed %d: the script never ended", seed)
		}
		c.check()
		c.checkDeleted(deleted())
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// TestLosersCampaignAtOnePace: a candidate that has lost many campaigns asks the
// store as often as one that has lost a single one.
func TestLosersCampaignAtOnePace(t *testing.T) {
	c := newCluster(t, 11, 3)
	key, err := c.admin.Get(background, meta.ElectionKey)
	c.must(err)
	for range 20 {
		for _, op := range []meta.Op{meta.Delete(meta.ElectionKey), meta.Put(meta.ElectionKey, key.Value, key.Lease)} {
			_, err := c.admin.Txn(background, meta.Txn{Then: []meta.Op{op}})
			c.must(err)
		}
		c.world.RunFor(time.Second)
	}
	before := map[*node]int{}
	for _, n := range c.nodes {
		before[n] = n.store.sent
	}
	leader := c.leader()
	const turns = 10
	c.world.RunFor(turns * meta.NodeTTL)
	for _, n := range c.nodes {
		if sent := n.store.sent - before[n]; n != leader && sent > turns+1 {
			t.Errorf("node %d sent %d campaigns in %d turns", n.id, sent, turns)
		}
	}
}
