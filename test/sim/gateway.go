package sim

import (
	"errors"
	"log/slog"
	"time"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// seat is the machine of a gateway.
type seat struct {
	c     *Cluster
	name  string
	clock float64 // rate of the machine's clock
	// wanted: this gateway is to have the volume. The other may still believe so.
	wanted  bool
	process *process          // nil while it is down
	up      func(*attachment) // called with each attachment
	died    func(*process)    // called with each process that crashed
}

// process is one life of a gateway: a client of the cluster and, while it is
// attached, the volume.
type process struct {
	seat   *seat
	loop   *loop.Sim
	meta   *meta.MemClient
	client *cluster.Client
	now    *attachment // nil while not attached
}

// attachment is one attachment of the volume under load.
type attachment struct {
	*process
	att    *cluster.Attachment
	volume *gateway.Volume
	since  clock.Instant // the export
	over   bool
}

func (c *Cluster) addSeat(name string, up func(*attachment), died func(*process)) *seat {
	s := &seat{c: c, name: name, clock: 1, up: up, died: died}
	c.seats = append(c.seats, s)
	return s
}

// start starts the process. It attaches the volume whenever it is wanted to.
func (s *seat) start() {
	c := s.c
	g := &process{seat: s, loop: c.World.NewLoop(nil), meta: c.Meta.Client()}
	g.loop.SetClock(s.clock, 0)
	s.process = g
	session := c.World.Rand().Uint64()
	log := quiet
	if c.opt.Log != nil {
		log = slog.New(slog.NewTextHandler(c.opt.Log, nil)).With("gateway", s.name)
	}
	g.client = cluster.New(cluster.Config{
		Loop: g.loop, Store: g.meta, Cluster: c.id, Log: log,
		Network: c.Net.Network(s.name, g.loop, transport.Identity{Hello: transport.Hello{Cluster: c.id, Session: session}}),
		Gateway: meta.GatewayMeta{ID: s.name, Incarnation: session, Addr: s.name, Boot: "boot " + s.name, Folder: "folder"},
	})
	g.loop.Post(func() {
		g.client.Start(c.ctx)
		g.attach()
	})
}

// attach tries until the volume is attached, as long as it is wanted to.
func (g *process) attach() {
	c := g.seat.c
	again := func() { g.loop.After(attachPause, g.attach) }
	if !g.seat.wanted {
		again()
		return
	}
	g.client.StartAttach(c.ctx, c.volume.ID, func(a *cluster.Attachment, err error) {
		if err != nil {
			c.logf("%s: attach: %v", g.seat.name, err)
			if _, other := c.owner(); c.restored && errors.Is(err, block.Busy) && other.process != nil && other.process.now != nil {
				c.force(c.volume.ID) // the backup does not know that it was taken away; a person sees who serves it
			}
			again()
			return
		}
		now := &attachment{process: g, att: a, since: c.World.Now()}
		now.volume = gateway.NewVolume(g.loop, a, gateway.Limits{}, func(err error) {
			c.logf("%s: the attachment ended: %v", g.seat.name, err)
			now.over, g.now = true, nil
			g.attach()
		})
		g.now = now
		c.logf("%s: attached under epoch %d", g.seat.name, a.Owner().Epoch)
		if !g.seat.wanted {
			g.detach()
			return
		}
		g.seat.up(now)
	})
}

// detach gives the volume back in order.
func (g *process) detach() {
	if now := g.now; now != nil {
		now.over, g.now = true, nil
		now.volume.Detach(func(error) { g.attach() })
	}
}

// crash ends the process without a word, and starts it again after a while.
func (s *seat) crash(back time.Duration) {
	c := s.c
	c.logf("%s crashes", s.name)
	g := s.process
	g.loop.Kill()
	if g.now != nil {
		g.now.over = true
	}
	c.Net.Crash(s.name)
	s.process = nil
	s.died(g)
	c.World.At(c.World.Now().Add(back), func() {
		if s.process == nil {
			s.start()
		}
	})
}

// attached is the attachment of the gateway that is to have the volume; nil
// while it has not.
func (c *Cluster) attached() *attachment {
	for _, s := range c.seats {
		if s.wanted && s.process != nil && s.process.now != nil {
			return s.process.now
		}
	}
	return nil
}

// want makes the other gateway the one that is to have the volume.
func (c *Cluster) want(to *seat) {
	for _, s := range c.seats {
		s.wanted = s == to
	}
}

// owner returns the gateway that is to have the volume, and the other.
func (c *Cluster) owner() (owner, other *seat) {
	if c.seats[0].wanted {
		return c.seats[0], c.seats[1]
	}
	return c.seats[1], c.seats[0]
}

// force removes whoever owns the volume, again and again until the metadata
// store has done it.
func (c *Cluster) force(id block.VolumeID) {
	if _, err := meta.ForceOwner(c.ctx, c.Meta.Client(), id); errors.Is(err, block.Unavailable) {
		c.World.At(c.World.Now().Add(attachPause), func() { c.force(id) })
	}
}
