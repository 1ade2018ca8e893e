// Command etcd is the stock etcd server, built from the module that Firn is
// tested with. It is for the image of docker-compose.yml, so that a machine
// without a registry can build everything from this repository; wherever there
// is a stock etcd, use that.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
