"""The optimizers, a small file per family. Whoever imports one of them knows the states of all."""

from fusedopt.optimizers.adadelta import FusedAdadelta as FusedAdadelta
from fusedopt.optimizers.adagrad import FusedAdagrad as FusedAdagrad
from fusedopt.optimizers.adam import FusedAdam as FusedAdam
from fusedopt.optimizers.adam import FusedAdamW as FusedAdamW
from fusedopt.optimizers.adamax import FusedAdamax as FusedAdamax
from fusedopt.optimizers.ademamix import FusedAdEMAMix as FusedAdEMAMix
from fusedopt.optimizers.asgd import FusedASGD as FusedASGD
from fusedopt.optimizers.lamb import FusedLAMB as FusedLAMB
from fusedopt.optimizers.lars import FusedLARS as FusedLARS
from fusedopt.optimizers.lion import FusedLion as FusedLion
from fusedopt.optimizers.muon import FusedMuon as FusedMuon
from fusedopt.optimizers.nadam import FusedNAdam as FusedNAdam
from fusedopt.optimizers.radam import FusedRAdam as FusedRAdam
from fusedopt.optimizers.rmsprop import FusedRMSprop as FusedRMSprop
from fusedopt.optimizers.rprop import FusedRprop as FusedRprop
from fusedopt.optimizers.sgd import FusedSGD as FusedSGD
from fusedopt.optimizers.stable_adamw import FusedStableAdamW as FusedStableAdamW
