package grpc_test

import (
	"testing"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/grpc"
	"firn.io/firn/cluster/transport/transporttest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

func TestConformance(t *testing.T) {
	transporttest.Run(t, &transporttest.Env{
		Network: func(t testing.TB, _ string, id transport.Identity) (transport.Network, func(func())) {
			l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
			t.Cleanup(l.Stop)
			return grpc.New(grpc.Options{Loop: l, Identity: id}), func(fn func()) { l.Call(fn) }
		},
		Wait:   transporttest.WaitReal(20 * time.Second),
		Listen: "127.0.0.1:0", Nowhere: "127.0.0.1:1",
	})
}

func BenchmarkRequestResponse(b *testing.B) {
	transporttest.Benchmark(b, func(_ string, l loop.Loop) transport.Network {
		return grpc.New(grpc.Options{Loop: l})
	}, "127.0.0.1:0")
}
