package inproc_test

import (
	"testing"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/cluster/transport/transporttest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

func TestConformance(t *testing.T) {
	fabric := inproc.NewFabric(nil)
	transporttest.Run(t, &transporttest.Env{
		Network: func(t testing.TB, name string, id transport.Identity) (transport.Network, func(func())) {
			l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
			t.Cleanup(l.Stop)
			return fabric.Network(name, l, id), func(fn func()) { l.Call(fn) }
		},
		Wait:   transporttest.WaitReal(10 * time.Second),
		Listen: "inproc:0", Nowhere: "inproc:nowhere",
	})
}

func BenchmarkRequestResponse(b *testing.B) {
	fabric := inproc.NewFabric(nil)
	transporttest.Benchmark(b, func(name string, l loop.Loop) transport.Network {
		return fabric.Network(name, l, transport.Identity{})
	}, "inproc:0")
}
