package sim

import (
	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

const (
	gatewayName = "gateway"
	gatewayID   = "gw"
)

// gatewayProcess is one life of the gateway: a client of the cluster and, once
// attached, the volume.
type gatewayProcess struct {
	c      *Cluster
	loop   *loop.Sim
	client *cluster.Client
	volume *gateway.Volume // nil until attached
}

// startGateway starts a gateway that attaches the volume, and tries again until
// it can. up is called on its loop with each volume.
func (c *Cluster) startGateway(id block.VolumeID, up func(*gateway.Volume)) {
	g := &gatewayProcess{c: c, loop: c.World.NewLoop(nil)}
	c.gateway = g
	session := c.World.Rand().Uint64()
	g.client = cluster.New(cluster.Config{
		Loop: g.loop, Store: c.Meta.Client(), Cluster: c.id,
		Network: c.Net.Network(gatewayName, g.loop, transport.Identity{Hello: transport.Hello{Cluster: c.id, Session: session}}),
		Gateway: meta.GatewayMeta{ID: gatewayID, Incarnation: session, Addr: gatewayName, Boot: "boot", Folder: "folder"},
	})
	g.loop.Post(func() {
		g.client.Start(c.ctx)
		g.attach(id, up)
	})
}

func (g *gatewayProcess) attach(id block.VolumeID, up func(*gateway.Volume)) {
	g.client.StartAttach(g.c.ctx, id, func(a *cluster.Attachment, err error) {
		if err != nil {
			g.c.logf("attach: %v", err)
			g.loop.After(attachPause, func() { g.attach(id, up) })
			return
		}
		g.c.logf("attached under epoch %d", a.Owner().Epoch)
		g.volume = gateway.NewVolume(g.loop, a, gateway.Limits{}, func(err error) {
			g.c.logf("the attachment ended: %v", err)
			g.volume = nil
			g.attach(id, up)
		})
		up(g.volume)
	})
}

// crash ends the process without a word.
func (g *gatewayProcess) crash() {
	g.c.logf("the gateway crashes")
	g.loop.Kill()
	g.c.Net.Crash(gatewayName)
	g.c.gateway = nil
}
